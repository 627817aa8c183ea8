// OpenAI's client for Node as its readme has it: address and key from the environment, the request from ASKED.
import OpenAI from "openai";

const asked = JSON.parse(process.env.ASKED);
const client = new OpenAI();

const { data: answer, response } = await client.chat.completions.create(asked).withResponse();
let streamed = "";
let usage = null;
for await (const chunk of await client.chat.completions.create({
  ...asked,
  stream: true,
  stream_options: { include_usage: true },
})) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const models = [];
for await (const model of client.models.list()) models.push(model.id);

async function refusal(call) {
  try {
    await call();
  } catch (error) {
    return { status: error.status, code: error.code, name: error.constructor.name };
  }
  return null;
}

console.log(
  JSON.stringify({
    id: answer.id,
    whole: answer.choices[0].message.content,
    version: response.headers.get("x-tidegate-version"),
    streamed,
    usage,
    models,
    refused: await refusal(() => new OpenAI({ apiKey: "none", maxRetries: 0 }).models.list()),
    wrong: await refusal(() => client.chat.completions.create({ ...asked, temperature: 9 })),
  }),
);
