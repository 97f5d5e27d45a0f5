// The conversation on the page: what was said, how it is shown, what its buttons do.
// Knows neither Markdown nor the server's wire format. Text goes into the page as text, never as HTML.

import { Markdown } from "./markdown.js";
import { ServerError, answer, feedback } from "./server.js";
import * as settings from "./settings.js";

const $ = (id) => document.getElementById(id);
const log = $("log");
const scroller = $("scroller");

// ---- the turns

// A turn is {role, content}; an assistant's also has {model, problem, reason, dropped, trace, good, usage, first, last}.
const conversation = settings.restored("sessionStorage", "conversation", []);
let running = null; // {abort, done} of the answer that is being given

function turnOf(name) {
  return $(name).content.firstElementChild.cloneNode(true);
}

function show(turn) {
  const view = turnOf(`${turn.role}-turn`);
  log.append(view);
  const on = (selector, act) => view.querySelector(selector).addEventListener("click", act);
  on(".copy", () => copy(turn.content));
  if (turn.role === "user") {
    view.querySelector(".said").textContent = turn.content;
    on(".edit", () => edit(turn, view));
  } else {
    view.querySelector(".who").textContent = turn.model;
    view.markdown = new Markdown(view.querySelector(".answer"), codeBlock);
    on(".retry", () => retry(turn));
    on(".good", () => rate(turn, view, true));
    on(".bad", () => rate(turn, view, false));
    view.painter = painter(() => refresh(turn, view));
    view.painter.end();
  }
  return view;
}

// Shows what has become of an answer, or as much of it as can be shown quickly; says whether that is all.
function refresh(turn, view) {
  const whole = !view.isConnected || view.markdown.update(turn.content, 50);
  const problem = view.querySelector(".problem");
  if (problem.textContent !== (turn.problem ?? "")) problem.textContent = turn.problem ?? "";
  problem.hidden = !turn.problem;
  view.querySelector(".copy").hidden = !turn.content;
  view.querySelector(".stats").textContent = statistics(turn);
  for (const [selector, good] of [[".good", true], [".bad", false]]) {
    const button = view.querySelector(selector);
    button.hidden = !turn.trace;
    button.setAttribute("aria-pressed", turn.good === good);
  }
  return whole;
}

const REASONS = { length: "cut at its token limit", stopped: "stopped", content_filter: "filtered" };

function statistics({ usage, first, last, reason, dropped }) {
  const facts = [];
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    facts.push(`prompt ${usage.prompt_tokens}${cached ? ` (${cached} cached)` : ""}, answer ${usage.completion_tokens} tokens`);
    // The time to the first token is the prompt's; in less than some milliseconds there is no speed to see.
    const seconds = (last - first) / 1000;
    if (seconds > 0.005) facts.push(`${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s`);
  }
  if (first !== undefined) facts.push(`first after ${(first / 1000).toFixed(2)} s`);
  if (REASONS[reason]) facts.push(REASONS[reason]);
  if (dropped) facts.push(`without the oldest ${dropped} messages`);
  return facts.map((fact) => fact.replaceAll(" ", "\u00a0")).join(" · ");
}

function codeBlock(text, language) {
  const view = turnOf("code-block");
  view.querySelector(".language").textContent = language || "text";
  view.querySelector("code").textContent = text;
  const button = view.querySelector(".copy-code");
  button.setAttribute("aria-label", `Copy code, ${language || "text"}`);
  button.addEventListener("click", () => copy(text));
  return view;
}

// Forgets the turns from this one on.
function forget(turn) {
  const index = conversation.indexOf(turn);
  conversation.length = index;
  while (log.children.length > index) log.lastElementChild.remove();
}

function settled() {
  settings.keep("sessionStorage", "conversation", conversation);
  $("welcome").hidden = conversation.length > 0;
}

// ---- asking

async function ask(text) {
  await stop();
  const turn = { role: "user", content: text };
  conversation.push(turn);
  show(turn);
  await respond();
}

function respond() {
  const controller = new AbortController();
  const done = receive(controller.signal);
  running = { abort: () => controller.abort(), done };
  return done;
}

async function receive(signal) {
  const messages = conversation.filter((turn) => turn.content).map(({ role, content }) => ({ role, content }));
  const body = settings.applied(messages);
  const turn = { role: "assistant", content: "", model: body.model };
  conversation.push(turn);
  const view = show(turn);
  view.setAttribute("aria-busy", true);
  document.body.classList.add("answering");
  announce("Answering");
  settled();
  follow();
  const begun = performance.now();
  try {
    for await (const event of answer(body, settings.key, signal)) {
      if (event.text) {
        turn.content += event.text;
        turn.last = performance.now() - begun;
        turn.first ??= turn.last;
      } else {
        Object.assign(turn, event);
      }
      view.painter.soon();
    }
    announce("Answer finished");
  } catch (error) {
    if (error.name === "AbortError") turn.reason = "stopped";
    else turn.problem = error instanceof ServerError ? error.message : `The page failed: ${error.message}`;
    announce(turn.problem ? "" : "Stopped");
    if (error.status === 401) settings.askForKey(() => retry(turn));
  }
  running = null;
  view.painter.end().then(() => view.setAttribute("aria-busy", false));
  document.body.classList.remove("answering");
  settled();
}

async function stop() {
  running?.abort();
  await running?.done;
}

async function retry(turn) {
  await stop();
  if (!conversation.includes(turn)) return;
  forget(turn);
  await respond();
}

function edit(turn, view) {
  const form = turnOf("editor");
  const field = form.querySelector("textarea");
  const said = view.querySelector(".said");
  const close = () => {
    form.replaceWith(said);
    view.classList.remove("editing");
    view.querySelector(".edit").focus();
  };
  field.value = turn.content;
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    } else sendOnEnter(event);
  });
  form.querySelector(".cancel").addEventListener("click", close);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = field.value.trim();
    if (!text) return;
    await stop();
    forget(turn);
    $("message").focus();
    await ask(text);
  });
  said.replaceWith(form);
  view.classList.add("editing");
  field.focus();
}

async function rate(turn, view, good) {
  try {
    await feedback(turn.trace, good, settings.key);
    turn.good = good;
    refresh(turn, view);
    announce("Thank you");
    settled();
  } catch (error) {
    if (error.status === 401) settings.askForKey(() => rate(turn, view, good));
    else announce(`The feedback was not taken: ${error.message}`, true);
  }
}

// ---- showing in time: at most a quarter of it goes into painting, however long an answer is

function painter(paint) {
  let timer = null;
  let cost = 0; // milliseconds of the last time
  let ended = null;
  const soon = () => (timer ??= setTimeout(now, ended ? 0 : Math.max(30, 3 * cost)));
  const now = () => {
    timer = null;
    const begun = performance.now();
    const whole = paint();
    scroller.scrollHeight; // lays the page out, so that its cost counts
    cost = performance.now() - begun;
    if (!whole) return soon();
    ended?.();
    ended = null;
  };
  // Paints at once, and is done when all is painted.
  const end = () =>
    new Promise((resolve) => {
      ended = resolve;
      clearTimeout(timer);
      now();
    });
  return { soon, end };
}

// The view stays at the end until somebody scrolls back from it.
let following = true;
let top = 0;

function follow() {
  following = true;
  $("jump").hidden = true;
  scroller.scrollTop = scroller.scrollHeight;
}

new ResizeObserver(() => following && follow()).observe(log);
scroller.addEventListener("scroll", () => {
  const left = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
  // Back is back, however little, unless it is the end that came up.
  following = scroller.scrollTop < top ? left < 2 : following || left < 40;
  top = scroller.scrollTop;
  $("jump").hidden = following;
});

// ---- saying something to the user

function announce(text, shown = false) {
  $("status").textContent = text;
  $("status").classList.toggle("hidden", !shown);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers have a clipboard only for pages from this machine or over TLS.
    const field = document.createElement("textarea");
    const before = document.activeElement;
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    before?.focus();
  }
  announce("Copied", true);
  setTimeout(() => $("status").textContent === "Copied" && announce(""), 2000);
}

// ---- keys and buttons

function sendOnEnter(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  event.target.form.requestSubmit();
}

$("message").addEventListener("keydown", sendOnEnter);
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("message").value.trim();
  if (!text || running) return;
  if (!settings.valid()) return;
  $("message").value = "";
  $("message").focus();
  ask(text);
});
$("stop").addEventListener("click", () => {
  stop();
  $("message").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
});
$("jump").addEventListener("click", () => follow());
$("new").addEventListener("click", async () => {
  await stop();
  conversation.length = 0;
  log.replaceChildren();
  settled();
  follow();
  $("message").focus();
});
for (const example of $("examples").children) example.addEventListener("click", () => ask(example.textContent));

for (const turn of conversation) show(turn);
settled();
follow();
if (!matchMedia("(pointer: coarse)").matches) $("message").focus();
