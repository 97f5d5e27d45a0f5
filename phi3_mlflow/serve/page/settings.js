// What is chosen on the page rather than said: the key, the model, a request's options, the theme; and where it is kept.
// Knows nothing of the conversation.

import { models } from "./server.js";

const $ = (id) => document.getElementById(id);
const options = $("options");

/** What was kept: "sessionStorage" lasts as long as the tab, "localStorage" as long as the browser. */
export function restored(storage, name, otherwise) {
  try {
    return JSON.parse(window[storage].getItem(`phi3-mlflow.${name}`)) ?? otherwise;
  } catch {
    return otherwise; // the browser keeps nothing for this page
  }
}

/** Keeps a value where `restored` finds it. */
export function keep(storage, name, value) {
  try {
    window[storage].setItem(`phi3-mlflow.${name}`, JSON.stringify(value));
  } catch {
    // Full or forbidden: the value then lasts as long as the page.
  }
}

// ---- the key

export let key = restored("sessionStorage", "key", "");
let afterKey = null;

function showKey(note) {
  $("refused").textContent = note;
  if ($("key-dialog").open) return; // somebody may be typing
  $("key-dialog").showModal();
  $("key").value = key;
  $("key").select();
}

/** Asks for a key because the server wants one, or another one; then does what was refused. */
export function askForKey(then) {
  afterKey = then ?? afterKey;
  showKey(key ? "The server refused this key." : "");
}

$("key-form").addEventListener("submit", () => {
  const then = afterKey;
  key = $("key").value;
  keep("sessionStorage", "key", key);
  listModels();
  then?.();
});
$("key-dialog").addEventListener("close", () => (afterKey = null));
$("cancel-key").addEventListener("click", () => $("key-dialog").close());
$("open-key").addEventListener("click", () => showKey(""));

// ---- the model

async function listModels() {
  const select = $("model");
  try {
    const names = await models(key);
    const chosen = select.value || restored("localStorage", "model", "");
    select.replaceChildren(...names.map((name) => new Option(name)));
    if (names.includes(chosen)) select.value = chosen;
    notice("");
  } catch (error) {
    notice(`The list of models did not come. ${error.message}`);
    if (error.status === 401) askForKey();
  }
}

function notice(text) {
  $("notice").firstElementChild.textContent = text;
  $("notice").hidden = !text;
}

$("model").addEventListener("change", () => keep("localStorage", "model", $("model").value));
$("reload").addEventListener("click", listModels);
listModels();

// ---- the options, of which an empty one is not sent

function given() {
  return [...new FormData(options)].filter(([, value]) => value !== "");
}

/** The request's body: these messages, with the model, the system message and the options that are set. */
export function applied(messages) {
  const body = { model: $("model").value, messages };
  for (const [name, value] of given()) {
    if (name === "system") body.messages = [{ role: "system", content: value }, ...messages];
    else if (name === "stop") body.stop = value.split("\n").filter(Boolean);
    else body[name] = options.elements[name].type === "number" ? Number(value) : value;
  }
  return body;
}

/** Whether each option is a value that can be sent; shows the first that is not. */
export function valid() {
  if (options.checkValidity()) return true;
  $("settings").showModal();
  return options.reportValidity();
}

function changed() {
  keep("localStorage", "options", Object.fromEntries(given()));
  $("open-settings").classList.toggle("changed", given().length > 0);
}

for (const [name, value] of Object.entries(restored("localStorage", "options", {}))) {
  if (options.elements[name]) options.elements[name].value = value;
}
changed();
options.addEventListener("input", changed);
options.addEventListener("reset", () => setTimeout(changed)); // the fields are emptied after the event
$("open-settings").addEventListener("click", () => $("settings").showModal());

// ---- the theme

const THEMES = ["system", "light", "dark"];

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").title = `Theme: ${theme}`;
  $("theme").setAttribute("aria-label", `Theme: ${theme}`);
}

setTheme(restored("localStorage", "theme", "system"));
$("theme").addEventListener("click", () => {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  setTheme(theme);
  keep("localStorage", "theme", theme);
});
