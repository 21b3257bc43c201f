// The playground: a chat that streams from /v1/chat/completions, as any client would.

import { el, number, time } from "/web/draw.js";

/** The JSON of each event of a server-sent stream. */
async function* events(body) {
  let rest = "";
  for await (const text of chunks(body.pipeThrough(new TextDecoderStream()))) {
    const parts = (rest + text).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function* chunks(stream) {
  const reader = stream.getReader(); // not every browser can iterate a stream itself
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

/** One answer on the page, and what is known of it. */
class Answer {
  constructor(log) {
    this.text = "";
    this.reasoning = "";
    this.sent = performance.now();
    this.first = this.last = 0;
    this.tokens = 0;
    this.thought = el("pre");
    this.thinking = el("details", { class: "thought", hidden: true }, el("summary", {}, "Reasoning"), this.thought);
    this.body = el("div", { class: "body waiting" });
    this.meta = el("p", { class: "meta num" }, "waiting for the first token");
    this.node = el("article", { class: "turn assistant", "aria-label": "Answer" }, this.thinking, this.body, this.meta);
    log.append(this.node);
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
    const delta = chunk.choices?.[0]?.delta ?? {};
    const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
    if (delta.content || reasoning) this.arrived();
    if (reasoning) {
      this.reasoning += reasoning;
      this.thinking.hidden = false;
      this.thought.append(reasoning);
    }
    if (delta.content) {
      this.text += delta.content;
      this.body.append(delta.content);
    }
  }

  arrived() {
    this.last = performance.now();
    if (!this.first) {
      this.first = this.last;
      this.body.classList.remove("waiting");
    }
    this.meta.textContent = this.pace();
  }

  pace() {
    const parts = [];
    if (this.first) parts.push(`first token ${time((this.first - this.sent) / 1000)}`);
    const seconds = (this.last - this.first) / 1000;
    if (this.tokens > 1 && seconds > 0) parts.push(`${number((this.tokens - 1) / seconds)} tok/s`);
    if (this.tokens) parts.push(`${number(this.tokens)} tokens`);
    return parts.join(" · ");
  }

  end(how = "") {
    this.body.classList.remove("waiting");
    this.meta.textContent = [this.pace(), how].filter(Boolean).join(" · ");
  }

  fail(sentence) {
    this.end();
    this.node.append(el("p", { class: "problem", role: "alert" }, sentence));
  }
}

export class Playground {
  /** request(path, options): a fetch with the key. */
  constructor(request) {
    this.request = request;
    this.messages = [];
    this.shown = []; // data URLs of pictures that go with the next message
    this.seeing = new Set(); // names of models that see
    this.abort = null;
    this.find("log", "empty", "ask", "message", "send", "clear", "system", "temperature", "max-tokens", "chat-model");
    this.find("pictures", "add", "files");
    this.ask.addEventListener("submit", (event) => this.submit(event));
    this["chat-model"].addEventListener("change", () => this.see());
    this.files.addEventListener("change", () => {
      this.attach(this.files.files);
      this.files.value = "";
    });
    this.message.addEventListener("paste", (event) => this.attach(event.clipboardData?.files ?? []));
    this.clear.addEventListener("click", () => this.reset());
    this.message.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) this.submit(event);
      if (event.key === "Escape") this.abort?.abort();
    });
  }

  find(...ids) {
    for (const id of ids) this[id] = document.getElementById(id);
  }

  /** models: as /status tells of them. */
  models(models) {
    const names = models.map((model) => model.name);
    this.seeing = new Set(models.filter((model) => model.sees).map((model) => model.name));
    const chosen = this["chat-model"].value;
    this["chat-model"].replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    if (names.includes(chosen)) this["chat-model"].value = chosen;
    this.see();
  }

  /** Pictures are offered to models that see only. */
  see() {
    this.add.hidden = !this.seeing.has(this["chat-model"].value);
    if (this.add.hidden) this.shown = [];
    this.preview();
  }

  async attach(files) {
    if (this.add.hidden) return;
    const pictures = [...files].filter((file) => file.type.startsWith("image/"));
    this.shown.push(...(await Promise.all(pictures.map(dataUrl))));
    this.preview();
  }

  preview() {
    this.pictures.hidden = !this.shown.length;
    this.pictures.replaceChildren(...this.shown.map((url, i) => {
      const drop = () => {
        this.shown.splice(i, 1);
        this.preview();
      };
      return el("button", { type: "button", title: "Remove this picture", click: drop }, el("img", { src: url, alt: `Picture ${i + 1}` }));
    }));
  }

  reset() {
    this.abort?.abort();
    this.messages = [];
    this.shown = [];
    this.preview();
    this.log.replaceChildren(this.empty);
    this.message.focus();
  }

  submit(event) {
    event.preventDefault();
    if (this.abort) return void this.abort.abort();
    const text = this.message.value.trim();
    if (!text && !this.shown.length) return;
    const pictures = this.shown;
    this.message.value = "";
    this.shown = [];
    this.preview();
    this.empty.remove();
    const seen = pictures.map((url, i) => el("img", { src: url, alt: `Picture ${i + 1}` }));
    this.log.append(el("article", { class: "turn user", "aria-label": "You" }, ...seen, text));
    const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
    const content = parts.length ? [...parts, { type: "text", text: text || "What is this?" }] : text;
    this.messages.push({ role: "user", content });
    this.answer();
  }

  async answer() {
    const messages = this.messages;
    const answer = new Answer(this.log);
    this.abort = new AbortController();
    this.running(true);
    try {
      const response = await this.request("/v1/chat/completions", this.options());
      if (!response.ok) throw new Error(await problem(response));
      for await (const chunk of events(response.body)) {
        answer.take(chunk);
        this.follow();
      }
      answer.end();
    } catch (error) {
      if (error.name === "AbortError") answer.end("stopped");
      else answer.fail(error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message);
    }
    // A question without an answer is asked again by the next one, were it to stay.
    if (answer.text) messages.push({ role: "assistant", content: answer.text });
    else messages.pop();
    this.abort = null;
    this.running(false);
    this.follow();
  }

  options() {
    const system = this.system.value.trim();
    const body = {
      model: this["chat-model"].value || "default",
      messages: system ? [{ role: "system", content: system }, ...this.messages] : this.messages,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
    if (this.temperature.value !== "") body.temperature = Number(this.temperature.value);
    if (this["max-tokens"].value !== "") body.max_tokens = Number(this["max-tokens"].value);
    const headers = { "content-type": "application/json" };
    return { method: "POST", headers, body: JSON.stringify(body), signal: this.abort.signal };
  }

  running(is) {
    this.send.textContent = is ? "Stop" : "Send";
    this.send.classList.toggle("stop", is);
    this.log.setAttribute("aria-busy", is); // read out when the answer is whole, not token by token
  }

  /** Stay at the end, unless somebody scrolled up to read. */
  follow() {
    if (this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 120) this.log.scrollTop = this.log.scrollHeight;
  }
}

/** A file as a URL that holds all of it. */
function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}

/** What went wrong, as the server says it. */
export async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}
