// A picture before and after: one canvas with a divider, zoom and pan, which both sides share, and a brush.

const MOST_ZOOM = 32;
const GRIP = 16; // distance from the divider, in CSS pixels, at which a pointer takes it
const STEP = 1.25;

export class Viewer {
  /**
   * @param canvas Shows both sides.
   * @param changed Called when the view or the mask has changed.
   */
  constructor(canvas, changed) {
    Object.assign(this, { canvas, changed, before: null, after: null, divide: 0.5, mode: "move", brush: 24 });
    this.mask = document.createElement("canvas"); // what is missing, opaque
    this.cursor = null; // of the keyboard's brush, in pixels of the picture
    this.pointers = new Map();
    this.fit();
    new ResizeObserver(() => this.draw()).observe(canvas);
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => this.up(event));
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("keydown", (event) => this.key(event));
    for (const end of ["keyup", "blur"]) canvas.addEventListener(end, ({ key = " " }) => { if (key === " ") this.pressed = false; });
  }

  /** Show another picture, without an answer and without a mask. */
  setBefore(bitmap) {
    this.before = bitmap;
    this.after = null;
    this.mask.width = bitmap.width;
    this.mask.height = bitmap.height;
    this.painted = false;
    this.cursor = null;
    this.fit();
  }

  setAfter(bitmap) {
    this.after = bitmap;
    this.draw();
  }

  fit() {
    this.zoom = 1;
    this.centre = [0.5, 0.5]; // in parts of the picture
    this.draw();
  }

  setMode(mode) {
    this.mode = mode;
    if (mode === "move") this.cursor = null;
    this.draw();
  }

  /** Draw a bitmap as this view shows the picture, over a whole canvas. */
  place(canvas, bitmap) {
    const ratio = devicePixelRatio || 1;
    const [width, height] = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)];
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (!this.before || !width) return null;
    const scale = Math.min(width / this.before.width, height / this.before.height) * this.zoom;
    const size = [this.before.width * scale, this.before.height * scale];
    const left = width / 2 - this.centre[0] * size[0];
    const top = height / 2 - this.centre[1] * size[1];
    const one = (shown) => {
      context.imageSmoothingEnabled = size[0] / shown.width < 3; // pixels stay pixels when they are large
      context.imageSmoothingQuality = "high";
      context.drawImage(shown, left, top, ...size);
    };
    if (bitmap) one(bitmap);
    return { context, width, height, scale, left, top, ratio, one };
  }

  draw() {
    const frame = this.place(this.canvas, null);
    if (!frame) return;
    const { context, width, height, ratio, one } = frame;
    const edge = this.after ? this.divide * width : width;
    const side = (from, to, bitmap) => {
      context.save();
      context.beginPath();
      context.rect(from, 0, to - from, height);
      context.clip();
      one(bitmap);
      context.restore();
    };
    side(0, edge, this.before);
    if (this.mode !== "move" || (this.painted && !this.after)) {
      context.globalAlpha = 0.55;
      one(this.mask);
      context.globalAlpha = 1;
    }
    if (this.after) {
      side(edge, width, this.after);
      this.line(context, edge, height, ratio);
    }
    if (this.cursor) this.ring(frame);
    this.frame = frame;
    this.canvas.style.touchAction = this.zoom > 1 || this.mode !== "move" ? "none" : "pan-y";
    this.changed();
  }

  line(context, edge, height, ratio) {
    context.fillStyle = "#fff";
    context.shadowColor = "rgb(0 0 0 / 60%)";
    context.shadowBlur = 4 * ratio;
    context.fillRect(edge - ratio, 0, 2 * ratio, height);
    context.beginPath();
    context.arc(edge, height / 2, 11 * ratio, 0, 2 * Math.PI);
    context.fill();
    context.shadowBlur = 0;
    context.fillStyle = "#0b6e6e";
    for (const way of [-1, 1]) {
      context.beginPath();
      context.moveTo(edge + way * 8 * ratio, height / 2);
      context.lineTo(edge + way * 3 * ratio, height / 2 - 4 * ratio);
      context.lineTo(edge + way * 3 * ratio, height / 2 + 4 * ratio);
      context.fill();
    }
  }

  ring({ context, left, top, scale, ratio }) {
    context.beginPath();
    context.arc(left + this.cursor[0] * scale, top + this.cursor[1] * scale, (this.radius() * scale), 0, 2 * Math.PI);
    for (const [width, colour] of [[4, "#000"], [2, "#fff"]]) {
      context.lineWidth = width * ratio;
      context.strokeStyle = colour;
      context.stroke();
    }
  }

  /** Of the brush, in pixels of the picture; its size is in thousandths of the longer side, doubled. */
  radius() {
    return Math.max(0.6, (this.brush / 1000) * Math.max(this.mask.width, this.mask.height));
  }

  zoomBy(factor, at = [0.5, 0.5]) {
    if (!this.frame) return;
    const zoom = Math.min(MOST_ZOOM, Math.max(1, this.zoom * factor));
    const { width, height, scale } = this.frame;
    const shift = (1 / scale) * (1 - this.zoom / zoom); // what lies at `at` stays there
    this.pan((at[0] - 0.5) * width * shift, (at[1] - 0.5) * height * shift, zoom);
  }

  /** Move the centre by pixels of the picture. */
  pan(x, y, zoom = this.zoom) {
    this.zoom = zoom;
    const clamp = (value) => (zoom === 1 ? 0.5 : Math.min(1, Math.max(0, value)));
    this.centre = [clamp(this.centre[0] + x / this.before.width), clamp(this.centre[1] + y / this.before.height)];
    this.draw();
  }

  /** Where an event is, in pixels of the picture. */
  at(event) {
    const { left, top, scale, ratio } = this.frame;
    return [(event.offsetX * ratio - left) / scale, (event.offsetY * ratio - top) / scale];
  }

  down(event) {
    if (!this.frame || event.button > 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
    const near = Math.abs(event.offsetX - this.divide * this.canvas.clientWidth) < GRIP;
    this.drag = this.pointers.size > 1 ? "pinch"
      : this.mode !== "move" ? "brush" : this.after && (near || this.zoom === 1) ? "divide" : "pan";
    if (this.drag === "brush") this.stroke(this.at(event), this.at(event));
    if (this.drag === "divide") this.setDivide(event.offsetX / this.canvas.clientWidth);
  }

  move(event) {
    const from = this.pointers.get(event.pointerId);
    if (!from) return;
    const to = [event.offsetX, event.offsetY];
    const { scale, ratio } = this.frame;
    if (this.drag === "pinch") {
      const apart = () => { const [a, b] = [...this.pointers.values()]; return Math.hypot(a[0] - b[0], a[1] - b[1]); };
      const before = apart();
      this.pointers.set(event.pointerId, to);
      if (this.pointers.size > 1) this.zoomBy(apart() / before, [to[0] / this.canvas.clientWidth, to[1] / this.canvas.clientHeight]);
      return;
    }
    this.pointers.set(event.pointerId, to);
    if (this.drag === "divide") this.setDivide(to[0] / this.canvas.clientWidth);
    if (this.drag === "pan") this.pan(((from[0] - to[0]) * ratio) / scale, ((from[1] - to[1]) * ratio) / scale);
    if (this.drag === "brush") this.stroke(this.at({ offsetX: from[0], offsetY: from[1] }), this.at(event));
  }

  up(event) {
    this.pointers.delete(event.pointerId);
  }

  wheel(event) {
    if (!this.frame || !(event.ctrlKey || document.activeElement === this.canvas)) return; // else the document scrolls
    event.preventDefault();
    this.zoomBy(Math.exp(-event.deltaY / 300), [event.offsetX / this.canvas.clientWidth, event.offsetY / this.canvas.clientHeight]);
  }

  key(event) {
    if (!this.before || event.ctrlKey || event.metaKey || event.altKey) return;
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const painting = this.mode !== "move";
    if (way && painting) {
      const from = this.cursor ?? [this.mask.width / 2, this.mask.height / 2];
      const step = this.radius() * (event.shiftKey ? 4 : 1);
      this.cursor = [from[0] + way[0] * step, from[1] + way[1] * step];
      if (this.pressed) this.stroke(from, this.cursor);
      this.draw();
    } else if (way) {
      const step = 0.1 / this.zoom;
      this.pan(way[0] * step * this.before.width, way[1] * step * this.before.height);
    } else if (event.key === " " && painting) {
      this.pressed = true; // arrows draw while it is held
      this.cursor ??= [this.mask.width / 2, this.mask.height / 2];
      this.stroke(this.cursor, this.cursor);
    } else if (event.key === "+" || event.key === "=") this.zoomBy(STEP);
    else if (event.key === "-") this.zoomBy(1 / STEP);
    else if (event.key === "0") this.fit();
    else return;
    event.preventDefault();
  }

  setDivide(share) {
    this.divide = Math.min(1, Math.max(0, share));
    this.draw();
  }

  /** Mark a line as missing, or as seen with the eraser. */
  stroke(from, to) {
    const context = this.mask.getContext("2d");
    context.globalCompositeOperation = this.mode === "erase" ? "destination-out" : "source-over";
    context.strokeStyle = "#e0457b";
    context.lineCap = "round";
    context.lineWidth = 2 * this.radius();
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(to[0] + 0.01, to[1]);
    context.stroke();
    this.painted = true;
    this.draw();
  }

  clearMask() {
    this.mask.getContext("2d").clearRect(0, 0, this.mask.width, this.mask.height);
    this.painted = false;
    this.draw();
  }

  /** The mask as the API takes it: black where pixels are missing, white elsewhere. */
  maskPicture() {
    const { width, height } = this.mask;
    const picture = Object.assign(document.createElement("canvas"), { width, height });
    const context = picture.getContext("2d", { willReadFrequently: true });
    context.drawImage(this.mask, 0, 0);
    const data = context.getImageData(0, 0, width, height);
    for (let k = 0; k < data.data.length; k += 4) {
      data.data.fill(data.data[k + 3] < 64 ? 255 : 0, k, k + 3);
      data.data[k + 3] = 255;
    }
    context.putImageData(data, 0, 0);
    return picture;
  }
}
