// The Anthropic client of npm against a running server: node anthropic.mjs URL KEY
import Anthropic from "@anthropic-ai/sdk";
import { ensure, run, weather } from "./checks.mjs";

const [url, key] = process.argv.slice(2);
const client = new Anthropic({ baseURL: url, apiKey: key, maxRetries: 0 });
const messages = [{ role: "user", content: "Say hello to Ann in one short sentence." }];
const model = "default";

await run("@anthropic-ai/sdk (npm)", {
  async message() {
    const answer = await client.messages.create({ model, messages, max_tokens: 12 });
    ensure(answer.content[0].type === "text" && answer.usage.input_tokens > 0, "wrong answer");
  },
  async stream() {
    const stream = client.messages.stream({ model, messages, max_tokens: 12 });
    let text = "";
    stream.on("text", (delta) => { text += delta; });
    const last = await stream.finalMessage();
    ensure(text.length > 0 && text === last.content[0].text, "stream and final text differ");
  },
  async tools() {
    const answer = await client.messages.create({
      model, max_tokens: 80, messages: [{ role: "user", content: "How is the weather in Rome?" }],
      tools: [{ name: "get_weather", input_schema: weather }], tool_choice: { type: "any", disable_parallel_tool_use: true },
    });
    const used = answer.content.find((block) => block.type === "tool_use");
    ensure(answer.stop_reason === "tool_use" && "city" in used.input, "no tool call");
  },
  async count() {
    ensure((await client.messages.countTokens({ model, messages })).input_tokens > 5, "no count");
  },
  async errors() {
    try {
      await client.messages.create({ model: "no-such-model", messages, max_tokens: 5 });
    } catch (error) {
      ensure(error instanceof Anthropic.NotFoundError, `${error}`);
      return;
    }
    throw new Error("accepted");
  },
});
