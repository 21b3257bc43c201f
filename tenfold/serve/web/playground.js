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
    this.abort = null;
    this.find("log", "empty", "ask", "message", "send", "clear", "system", "temperature", "max-tokens", "chat-model");
    this.ask.addEventListener("submit", (event) => this.submit(event));
    this.clear.addEventListener("click", () => this.reset());
    this.message.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) this.submit(event);
      if (event.key === "Escape") this.abort?.abort();
    });
  }

  find(...ids) {
    for (const id of ids) this[id] = document.getElementById(id);
  }

  models(names) {
    const chosen = this["chat-model"].value;
    this["chat-model"].replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    if (names.includes(chosen)) this["chat-model"].value = chosen;
  }

  reset() {
    this.abort?.abort();
    this.messages = [];
    this.log.replaceChildren(this.empty);
    this.message.focus();
  }

  submit(event) {
    event.preventDefault();
    if (this.abort) return void this.abort.abort();
    const text = this.message.value.trim();
    if (!text) return;
    this.message.value = "";
    this.empty.remove();
    this.log.append(el("article", { class: "turn user", "aria-label": "You" }, text));
    this.messages.push({ role: "user", content: text });
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

/** What went wrong, as the server says it. */
export async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}
