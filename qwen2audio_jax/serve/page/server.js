// The server's protocol, as much of it as the page speaks.

let key = sessionStorage.getItem("key") ?? "";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function useKey(given) {
  key = given;
  sessionStorage.setItem("key", given);
}

async function ask(address, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(address, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refused(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw new Refused(response.status, said.error?.message ?? `The server answered with status ${response.status}.`);
}

/** The model that is served. */
export async function served() {
  return (await (await ask("v1/models")).json()).data[0];
}

/** Whether it is ready: {status, shapes_compiled, shapes}. */
export async function health() {
  return (await fetch("health")).json();
}

/** The pieces of an answer as they come: {text}, and at the end {tokens, reason}. */
export async function* chat(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let reason = null;
  for await (const data of events(response.body.pipeThrough(new TextDecoderStream()))) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(0, chunk.error.message);
    const choice = chunk.choices[0];
    reason = choice?.finish_reason ?? reason;
    if (choice?.delta.content) yield { text: choice.delta.content };
    if (chunk.usage) yield { tokens: chunk.usage.completion_tokens, reason };
  }
  throw new Refused(0, "The connection ended before the answer did.");
}

async function* events(stream) {
  const reader = stream.getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    for (const event of whole) yield event.slice("data: ".length);
  }
}
