// Search without a server: a browser starts no worker from file:, so the worker's script runs in a frame instead.
if (location.protocol === "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super()
    const frame = document.createElement("iframe")
    frame.hidden = true
    document.body.append(frame)
    const inside = frame.contentWindow, script = inside.document.createElement("script")
    inside.postMessage = data => {
      const event = new MessageEvent("message", {data})
      if (this.onmessage) this.onmessage(event)
      this.dispatchEvent(event)
    }
    this.ready = new Promise(done => { script.onload = done })
    this.postMessage = data => this.ready.then(() => inside.dispatchEvent(new inside.MessageEvent("message", {data})))
    script.src = url
    inside.document.body.append(script)
  }
  terminate() {}
}
