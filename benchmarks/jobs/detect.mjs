import { env, pipeline } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = ".";
const [folder, ...images] = process.argv.slice(2);
const options = folder === "float" ? { dtype: "fp32", subfolder: "" } : { dtype: "q8" };
const detect = await pipeline("object-detection", folder, options);
const answers = [];
for (const image of images) {
  answers.push(await detect(image, { threshold: 0.3 }));
}
console.log(JSON.stringify(answers));
