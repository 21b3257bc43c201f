// The OpenAI client of npm against a running server: node openai.mjs URL KEY
import OpenAI from "openai";
import { ensure, run, weather } from "./checks.mjs";

const [url, key] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const messages = [{ role: "user", content: "Say hello to Ann in one short sentence." }];
const model = "default";
const tool = { type: "function", function: { name: "get_weather", parameters: weather, strict: true } };

await run("openai (npm)", {
  async models() {
    const listed = await client.models.list();
    ensure(listed.data.length > 0, "no models");
  },
  async chat() {
    const answer = await client.chat.completions.create({ model, messages, max_completion_tokens: 12, n: 2 });
    ensure(answer.choices.length === 2 && answer.usage.completion_tokens > 0, "wrong answer");
  },
  async chatStream() {
    const stream = client.chat.completions.stream({
      model, messages, max_completion_tokens: 12, stream_options: { include_usage: true },
    });
    let text = "";
    stream.on("content", (delta) => { text += delta; });
    const last = await stream.finalChatCompletion();
    ensure(text.length > 0 && text === last.choices[0].message.content, "stream and final text differ");
    ensure((await stream.totalUsage()).completion_tokens > 0, "no usage");
  },
  async tools() {
    const answer = await client.chat.completions.create({
      model, messages: [{ role: "user", content: "How is the weather in Rome?" }],
      tools: [tool], tool_choice: "required", max_completion_tokens: 60,
    });
    const call = answer.choices[0].message.tool_calls[0];
    ensure("city" in JSON.parse(call.function.arguments), "no city");
  },
  async embeddings() {
    const answer = await client.embeddings.create({ model, input: ["a cat", "a dog"] });
    ensure(answer.data.length === 2 && answer.data[0].embedding.length > 8, "no vectors");
  },
  async responses() {
    const answer = await client.responses.create({ model, input: "Say hello.", max_output_tokens: 12 });
    ensure(answer.output_text.length > 0, "no text");
    const stream = client.responses.stream({ model, input: "Say hello.", max_output_tokens: 8 });
    const last = await stream.finalResponse();
    ensure(last.output_text.length > 0, "no streamed text");
  },
  async errors() {
    for (const [wrong, kind] of [[{ model: "no-such-model" }, OpenAI.NotFoundError], [{ temperature: -1 }, OpenAI.BadRequestError]]) {
      try {
        await client.chat.completions.create({ model, messages, ...wrong });
      } catch (error) {
        ensure(error instanceof kind, `${error}`);
        continue;
      }
      throw new Error("accepted");
    }
  },
});
