import { readFileSync } from "node:fs";
import { env, pipeline } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = ".";
const [folder, file] = process.argv.slice(2);
const texts = readFileSync(file, "utf8").trim().split("\n");
const options = folder === "float" ? { dtype: "fp32", subfolder: "" } : { dtype: "q8" };
const classify = await pipeline("text-classification", folder, options);
const answers = await classify(texts);
console.log(JSON.stringify(answers.map((answer) => answer.label)));
