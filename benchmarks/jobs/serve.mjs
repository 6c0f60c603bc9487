import { readFileSync } from "node:fs";
import { AutoTokenizer, env } from "@huggingface/transformers";
import * as ort from "onnxruntime-web";

env.allowRemoteModels = false;
env.localModelPath = ".";
const [folder, model, file] = process.argv.slice(2);
const texts = readFileSync(file, "utf8").trim().split("\n");
const { id2label } = JSON.parse(readFileSync(`${folder}/config.json`, "utf8"));
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const bytes = readFileSync(`${folder}/${model}`);
const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
const labels = [];
for (const text of texts) {
  const tokens = tokenizer(text);
  const feed = {};
  for (const name of session.inputNames) {
    const { data, dims } = tokens[name].ort_tensor ?? tokens[name];
    feed[name] = new ort.Tensor("int64", data, dims);
  }
  const { logits } = await session.run(feed);
  labels.push(id2label[logits.data.indexOf(Math.max(...logits.data))]);
}
console.log(JSON.stringify(labels));
