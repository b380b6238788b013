"Hands the metadata of settings.ini to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
ini = ConfigParser(interpolation=None)
ini.read(here / "settings.ini", encoding="utf-8")
meta = ini["DEFAULT"]
lines = lambda key: [line for line in meta[key].splitlines() if line.strip()]
version = (here / "ganprompt/__init__.py").read_text().split('"')[1]

setup(
    name=meta["lib_name"], version=version, description=meta["description"], keywords=meta["keywords"].split(),
    author=meta["author"], license=meta["license"], python_requires=">=" + meta["min_python"],
    long_description=(here / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    packages=["ganprompt"], install_requires=lines("requirements"),
    extras_require={extra: lines(f"{extra}_requirements") for extra in ("dev", "baselines", "test")}, entry_points={"console_scripts": lines("console_scripts")},
)
