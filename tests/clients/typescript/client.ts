// Encodes, denoises and samples with the generated types, and prints the answers as JSON.
// `node client.js URL`, with images (n, c, h, w) as JSON on standard input.
import { readFileSync } from "node:fs";
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

type Schemas = components["schemas"];

const images: number[][][][] = JSON.parse(readFileSync(0, "utf8"));
const client = createClient<paths, "application/json" | "application/problem+json">({ baseUrl: process.argv[2] });

const encode = await client.POST("/v1/encode", { body: { images, draws: 2, seed: 7 } });
const encoded: Schemas["EncodeAnswer"] | undefined = encode.data;
if (!encoded) throw new Error(JSON.stringify(encode.error));

const denoise = await client.POST("/v1/models/{model}/denoise", {
  params: { path: { model: encoded.model } },
  body: { images, noise: "gaussian", level: 0.25, uncertainty: true },
});
const denoised: Schemas["DenoiseAnswer"] | undefined = denoise.data;
if (!denoised) throw new Error(JSON.stringify(denoise.error));

const sample = await client.POST("/v1/models/{model}/sample", {
  params: { path: { model: encoded.model }, query: { count: 2, seed: 7 } },
});
const sampled: Schemas["SampleAnswer"] | undefined = sample.data;
if (!sampled) throw new Error(JSON.stringify(sample.error));

const decode = await client.POST("/v1/decode", { body: { latents: encoded.mean, fingerprint: "another" } });
const refused: Schemas["Problem"] | undefined = decode.error;

console.log(JSON.stringify({ encode: encoded, denoise: denoised, sample: sampled, decode: refused }));
