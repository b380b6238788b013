"Hands the metadata of settings.ini to setuptools."
from configparser import ConfigParser
from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(interpolation=None)
ini.read(here / "settings.ini", encoding="utf-8")
meta = ini["DEFAULT"]
lines = lambda key: [line for line in meta[key].splitlines() if line.strip()]
version = (here / "ganprompt/__init__.py").read_text().split('"')[1]

class WithChapters(build_py):
    "A wheel carries the chapters and the small data files, which an editable installation finds where they are."
    def run(self):
        super().run()
        if self.editable_mode: return
        for folder in ("nbs", "data"):
            copytree(here / folder, Path(self.build_lib) / "ganprompt/repository" / folder, dirs_exist_ok=True,
                     ignore=ignore_patterns("raw", "results", ".*", "__pycache__"))


setup(
    name=meta["lib_name"], version=version, description=meta["description"], keywords=meta["keywords"].split(),
    author=meta["author"], license=meta["license"], python_requires=">=" + meta["min_python"],
    long_description=(here / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    packages=["ganprompt"], cmdclass={"build_py": WithChapters}, install_requires=lines("requirements"),
    extras_require={extra: lines(f"{extra}_requirements") for extra in ("dev", "baselines", "test", "sweep", "scale")},
    entry_points={"console_scripts": lines("console_scripts")},
)
