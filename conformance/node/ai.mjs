// The OpenAI-compatible provider of the ai SDK against a running server: node ai.mjs URL KEY
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import { ensure, run, weather } from "./checks.mjs";

const [url, key] = process.argv.slice(2);
const provider = createOpenAICompatible({
  name: "tenfold", baseURL: `${url}/v1`, apiKey: key, includeUsage: true, supportsStructuredOutputs: true,
});
const model = provider("default");
const prompt = "Say hello to Ann in one short sentence.";
const tools = { get_weather: tool({ description: "The weather in a city.", inputSchema: jsonSchema(weather) }) };

await run("ai + @ai-sdk/openai-compatible (npm)", {
  async generateText() {
    const { text, usage } = await generateText({ model, prompt, maxOutputTokens: 12, maxRetries: 0 });
    ensure(text.length > 0 && usage.outputTokens > 0, "no text");
  },
  async streamText() {
    const result = streamText({ model, prompt, maxOutputTokens: 12, maxRetries: 0 });
    let text = "";
    for await (const part of result.textStream) text += part;
    ensure(text.length > 0 && text === (await result.text), "stream and text differ");
    ensure((await result.usage).outputTokens > 0, "no usage");
  },
  async generateObject() {
    const schema = jsonSchema({
      type: "object", required: ["name"], additionalProperties: false,
      properties: { name: { type: "string", maxLength: 20 } },
    });
    const { object } = await generateObject({ model, schema, prompt: "Invent a person.", maxOutputTokens: 60, maxRetries: 0 });
    ensure(typeof object.name === "string", "no name");
  },
  async tools() {
    const { toolCalls } = await generateText({
      model, prompt: "How is the weather in Rome?", tools, toolChoice: "required", maxOutputTokens: 60, maxRetries: 0,
    });
    ensure("city" in toolCalls[0].input, "no city");
  },
  async toolsStream() {
    const result = streamText({
      model, prompt: "How is the weather in Rome?", tools, toolChoice: "required", maxOutputTokens: 60, maxRetries: 0,
    });
    const calls = await result.toolCalls;
    ensure("city" in calls[0].input, "no city");
  },
  async embed() {
    const { embeddings } = await embedMany({ model: provider.textEmbeddingModel("default"), values: ["a cat", "a dog"] });
    ensure(embeddings.length === 2, "no vectors");
  },
});
