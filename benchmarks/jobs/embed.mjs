import { readFileSync } from "node:fs";
import { env, pipeline } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = ".";
const [folder, file] = process.argv.slice(2);
const texts = readFileSync(file, "utf8").trim().split("\n");
const options = folder === "float" ? { dtype: "fp32", subfolder: "" } : { dtype: "q8" };
const embed = await pipeline("feature-extraction", folder, options);
const vectors = await embed(texts, { pooling: "mean", normalize: true });
console.log(JSON.stringify(vectors.tolist()));
