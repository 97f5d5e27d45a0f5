// The server's routes as the page uses them: models, streamed answers, feedback.
// Knows nothing of what is shown. Paths are relative, so that the page also works below a proxy's prefix.

/** Why the server gave no answer: its own words, and the HTTP status (0 where there was none). */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const LOST = "The connection was lost before the answer ended.";

async function call(path, key, { body, signal } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const request = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
  let response;
  try {
    response = await fetch(path, request);
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError("The server cannot be reached.");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  const message = answer?.error?.message ?? `The server answers ${response.status} ${response.statusText}`.trim();
  const wait = response.headers.get("Retry-After");
  throw new ServerError(wait ? `${message} (Try again in ${wait} s.)` : message, response.status);
}

/** The names of the models that can be asked. */
export async function models(key) {
  const answer = await (await call("v1/models", key)).json();
  return answer.data.map((model) => model.id);
}

/** Says of one traced answer whether it was good. */
export async function feedback(trace, good, key) {
  await call("feedback", key, { body: { trace_id: trace, value: good } });
}

// The JSON of each `data:` line, up to `[DONE]`. OpenAI's events have one such line each.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let parts = []; // of the line that has not ended yet
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const [end, ...lines] = value.split("\n");
      parts.push(end);
      for (const next of lines) {
        const line = parts.join("");
        parts = [next];
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } catch (error) {
    if (error instanceof SyntaxError) throw new ServerError("The server sent something that is not JSON.");
    throw error.name === "AbortError" ? error : new ServerError(LOST);
  } finally {
    reader.cancel().catch(() => {}); // of a stream that has broken there is nothing left to cancel
  }
}

/**
 * One answer, as it comes.
 *
 * @param body the request without its streaming options
 * @param signal aborts the request, and with it the server's work
 * @yields {{trace: ?string}} first, then any of {text}, {reason}, {usage}, {dropped: messages left out}
 * @throws ServerError when it is refused or breaks off; AbortError
 */
export async function* answer(body, key, signal) {
  const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await call("v1/chat/completions", key, { body: streamed, signal });
  yield { trace: response.headers.get("x-mlflow-trace-id") };
  let finished = false;
  for await (const chunk of events(response)) {
    if (chunk.error) throw new ServerError(chunk.error.message);
    const choice = chunk.choices[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) {
      finished = true;
      yield { reason: choice.finish_reason };
    }
    if (chunk.usage) yield { usage: chunk.usage };
    if (chunk.custom_outputs?.dropped_messages) yield { dropped: chunk.custom_outputs.dropped_messages };
  }
  if (!finished) throw new ServerError(LOST);
}
