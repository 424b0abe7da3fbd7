// Denoises a picture with `fetch`, in Node and in browsers:
//   node examples/clients/denoise.mjs http://127.0.0.1:8000 examples/noisy.png restored.png
// A page imports `denoise` and passes a file that its user has chosen. Where the page is from another address than the
// service, VAE_CORS_ORIGINS must name the page's.

/** The denoised picture, a Blob, and the level of noise that was found, in parts of white. */
export async function denoise(url, picture, key) {
  const headers = { Accept: "image/png", ...(key && { Authorization: `Bearer ${key}` }) };
  const form = new FormData();
  form.append("file", picture, "picture");
  const answer = await fetch(`${url}/v1/models/mnist/denoise`, { method: "POST", body: form, headers });
  if (!answer.ok) {
    const { code, detail } = await answer.json();
    throw new Error(`${code}: ${detail}`);
  }
  return { picture: await answer.blob(), level: Number(answer.headers.get("X-Level")) };
}

if (typeof process !== "undefined" && process.argv[1]?.endsWith("denoise.mjs")) {
  const { readFile, writeFile } = await import("node:fs/promises");
  const [url, from, to] = process.argv.slice(2);
  const { picture, level } = await denoise(url, new Blob([await readFile(from)]), process.env.KEY);
  await writeFile(to, Buffer.from(await picture.arrayBuffer()));
  console.log(`level ${level}`);
}
