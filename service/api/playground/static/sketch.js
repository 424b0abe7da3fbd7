// A pad on which a person draws white on black with pointer or keys, in a model's own pixels.

const PEN = 0.082; // width of the pen in parts of the longer side: two pixels of 28, as in MNIST

export class Sketch {
  /**
   * @param canvas Its pixels are those of the image.
   * @param pen The element that shows where the keyboard's pen is.
   * @param changed Called with the time of the event that changed the image.
   */
  constructor(canvas, pen, changed) {
    Object.assign(this, { canvas, pen, changed, empty: true, place: null, lowered: false });
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.clear();
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.last = this.at(event);
      this.line(this.last, this.last, event.timeStamp);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.last) return;
      for (const one of event.getCoalescedEvents?.() ?? [event]) {
        const to = this.at(one);
        this.line(this.last, to);
        this.last = to;
      }
      this.changed(event.timeStamp);
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { this.last = null; });
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("blur", () => { pen.hidden = true; });
  }

  resize(width, height) {
    if (this.canvas.width === width && this.canvas.height === height) return;
    Object.assign(this.canvas, { width, height });
    this.clear();
  }

  clear() {
    this.context.fillStyle = "#000";
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.empty = true;
  }

  show(bitmap, time) {
    this.clear();
    this.context.drawImage(bitmap, 0, 0, this.canvas.width, this.canvas.height);
    this.empty = false;
    this.changed(time);
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * this.canvas.width, ((event.clientY - box.top) / box.height) * this.canvas.height];
  }

  line(from, to, time) {
    const { context } = this;
    context.strokeStyle = "#fff";
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = PEN * Math.max(this.canvas.width, this.canvas.height);
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(to[0] + 0.01, to[1]);
    context.stroke();
    this.empty = false;
    if (time !== undefined) this.changed(time);
  }

  key(event) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const { width, height } = this.canvas;
    this.place ??= [width / 2, height / 2];
    if (way) {
      const from = this.place;
      this.place = [Math.min(width - 1, Math.max(1, from[0] + way[0])), Math.min(height - 1, Math.max(1, from[1] + way[1]))];
      if (this.lowered) this.line(from, this.place, event.timeStamp);
    } else if (event.key === " ") {
      this.lowered = !this.lowered;
      if (this.lowered) this.line(this.place, this.place, event.timeStamp);
    } else if (event.key === "Delete" || event.key === "Backspace") {
      this.clear();
      this.changed(event.timeStamp);
    } else return;
    event.preventDefault();
    this.pen.hidden = false;
    this.pen.classList.toggle("down", this.lowered);
    this.pen.style.left = `${(100 * this.place[0]) / width}%`;
    this.pen.style.top = `${(100 * this.place[1]) / height}%`;
  }
}
