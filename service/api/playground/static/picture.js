// Picture files: reading what the browser can decode, and writing PNG with 16 bits.

const SIGNATURES = { png: [0x89, 0x50, 0x4e, 0x47], little: [0x49, 0x49], big: [0x4d, 0x4d] };
const BITS = 24; // place of the bit depth in a PNG

/** What the first bytes say: { tiff, deep }, where `deep` means 16 bits. */
export async function kindOf(blob) {
  const head = new Uint8Array(await blob.slice(0, 32).arrayBuffer());
  const starts = (bytes) => bytes.every((byte, k) => head[k] === byte);
  const tiff = starts(SIGNATURES.little) || starts(SIGNATURES.big);
  return { tiff, deep: starts(SIGNATURES.png) && head[BITS] === 16 };
}

/** The picture as the browser decodes it, upright; null if it cannot. */
export async function decoded(blob) {
  try {
    return await createImageBitmap(blob);
  } catch {
    return null;
  }
}

/** The first image of JSON, numbers in [0, 1]: { channels, height, width, values }, channel by channel. */
export function ofJson([image]) {
  return { channels: image.length, height: image[0].length, width: image[0][0].length, values: image.flat(2) };
}

/** The first image of an .npy of float32 images (n, c, h, w), likewise. */
export function ofNpy(buffer) {
  const start = 10 + new DataView(buffer).getUint16(8, true); // a multiple of 64
  const head = new TextDecoder("latin1").decode(new Uint8Array(buffer, 10, start - 10));
  const [, channels, height, width] = head.match(/\(([\d, ]+)\)/)[1].split(",").map(Number);
  return { channels, height, width, values: new Float32Array(buffer, start, channels * height * width) };
}

/** An image as a bitmap. */
export function bitmapOf({ channels, height, width, values }) {
  const { data } = new ImageData(width, height);
  const plane = height * width;
  for (let k = 0; k < plane; k++) {
    for (let c = 0; c < 3; c++) data[4 * k + c] = Math.round(255 * values[k + (channels > 1 ? c * plane : 0)]); // clamps
    data[4 * k + 3] = 255;
  }
  return createImageBitmap(new ImageData(data, width, height));
}

export const blobOf = (canvas) => new Promise((done) => { canvas.toBlob(done, "image/png"); });
export const base64Of = (canvas) => canvas.toDataURL("image/png").split(",")[1];

/** An image as a PNG with 16 bits. */
export async function deepPng({ channels, height, width, values }) {
  const line = 1 + 2 * channels * width; // each line begins with its filter, 0
  const raw = new DataView(new ArrayBuffer(line * height));
  for (let c = 0, k = 0; c < channels; c++) {
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++, k++) {
        const level = Math.round(65535 * Math.min(1, Math.max(0, values[k])));
        raw.setUint16(y * line + 1 + 2 * (x * channels + c), level);
      }
    }
  }
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, 16);
  header.setUint8(9, channels === 3 ? 2 : 0);
  const packed = new Blob([raw]).stream().pipeThrough(new CompressionStream("deflate"));
  const parts = [
    new Uint8Array([...SIGNATURES.png, 0x0d, 0x0a, 0x1a, 0x0a]),
    chunk("IHDR", new Uint8Array(header.buffer)),
    chunk("IDAT", new Uint8Array(await new Response(packed).arrayBuffer())),
    chunk("IEND", new Uint8Array()),
  ];
  return new Blob(parts, { type: "image/png" });
}

function chunk(name, content) {
  const bytes = new Uint8Array(12 + content.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  bytes.set(new TextEncoder().encode(name), 4);
  bytes.set(content, 8);
  view.setUint32(8 + content.length, crc(bytes.subarray(4, 8 + content.length)));
  return bytes;
}

const TABLE = Uint32Array.from({ length: 256 }, (_, k) => {
  let value = k;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value;
});

function crc(bytes) {
  let value = 0xffffffff;
  for (const byte of bytes) value = TABLE[(value ^ byte) & 255] ^ (value >>> 8);
  return ~value >>> 0;
}
