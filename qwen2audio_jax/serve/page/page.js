// The page: what is asked, what is answered, and the keys and buttons for both.

import { clock, player } from "./player.js";
import { Refused, chat, health, served, useKey } from "./server.js";
import { fromFile, record, recorded } from "./sound.js";

const TAP = 350; // milliseconds: a shorter press starts a recording that the next press ends
const SHORTEST = 0.25; // seconds of a recording

const by = (id) => document.getElementById(id);
const [log, text, talk, hint, clips] = ["log", "text", "talk", "hint", "clips"].map(by);

let model = { id: "", max_audio_seconds: 30 };
let turns = []; // {content, answer}: what the model is told again in each later turn
let waiting = []; // clips that go with the next message
let answering = null; // AbortController of the answer that is coming
let recording = null; // see `press`

// What the server is

async function connect() {
  try {
    model = await served();
  } catch (error) {
    if (error.status === 401) return askForKey(connect);
    by("state").textContent = error.message;
    return setTimeout(connect, 3000);
  }
  watch();
}

async function watch() {
  const known = await health().catch(() => null);
  if (!known) return connect();
  const words = { ready: model.id, failed: `${model.id} has failed` };
  by("state").textContent = words[known.status] ?? `${model.id}, getting ready: ${known.shapes_compiled} of ${known.shapes} programs`;
  if (known.status === "compiling") setTimeout(watch, 1000);
}

function askForKey(then) {
  const dialog = by("key-dialog");
  by("key").value = "";
  dialog.showModal();
  dialog.onclose = () => {
    useKey(by("key").value);
    then();
  };
  dialog.oncancel = (event) => event.preventDefault();
}

// Asking and answering

function send() {
  const words = text.value.trim();
  if (answering || recording || (!words && !waiting.length)) return;
  const content = waiting.map(({ data, format }) => ({ type: "input_audio", input_audio: { data, format } }));
  if (words) content.push({ type: "text", text: words });
  const asked = item("asked");
  for (const clip of waiting) asked.append(player(clip));
  asked.append(paragraph("words", words));
  waiting = [];
  text.value = "";
  showClips();
  grow();
  by("welcome").hidden = true;
  answer({ content, answer: null });
}

function stop() {
  answering?.abort();
  answering = null;
}

async function answer(turn) {
  const element = item("answered");
  const words = element.appendChild(paragraph("words"));
  const began = performance.now();
  let first = 0;
  let last = 0;
  let end = null;
  const conversation = turns;
  element.setAttribute("aria-busy", "true");
  const own = (answering = new AbortController());
  show();
  try {
    for await (const piece of chat(request(turn), own.signal)) {
      if (piece.text) {
        last = performance.now();
        first ||= last;
        follow(() => (words.textContent += piece.text));
      } else end = piece;
    }
    by("said").textContent = `Answer: ${words.textContent}`;
  } catch (error) {
    if (error.name !== "AbortError") fail(element, error, turn);
    else end = { reason: "stopped" };
  }
  turn.answer = words.textContent || null;
  if (turn.answer !== null) conversation.push(turn);
  element.removeAttribute("aria-busy");
  follow(() => element.append(paragraph("figures", figures({ began, first, last, end }))));
  if (answering === own) answering = null;
  show();
}

function request(turn) {
  const system = by("system").value.trim();
  const said = turns.flatMap(({ content, answer }) => [
    { role: "user", content },
    { role: "assistant", content: answer },
  ]);
  return {
    model: model.id,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...said, { role: "user", content: turn.content }],
    temperature: Number(by("temperature").value),
    max_tokens: Number(by("length").value) || 256,
  };
}

function figures({ began, first, last, end }) {
  const parts = [];
  if (first) parts.push(`${((first - began) / 1000).toFixed(2)} s to the first token`);
  // Of the whole answer: tokens that arrive together tell no time between them.
  if (end?.tokens && last > began) parts.push(`${((1000 * end.tokens) / (last - began)).toFixed(0)} tokens/s`);
  if (end?.tokens) parts.push(`${end.tokens} tokens`);
  if (end?.reason === "length") parts.push("cut at the length that is set");
  if (end?.reason === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

function fail(element, error, turn) {
  const box = element.appendChild(paragraph("failed"));
  box.setAttribute("role", "alert");
  box.append(Object.assign(document.createElement("span"), { textContent: error.message }));
  const again = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: "Try again" });
  const retry = () => {
    if (answering) return;
    element.remove();
    if (turns.includes(turn)) turns.splice(turns.indexOf(turn), 1);
    answer(turn);
  };
  again.onclick = retry;
  box.append(again);
  if (error instanceof Refused && error.status === 401) askForKey(retry);
}

// Talking

async function press() {
  if (recording) return finish(); // the second tap
  stop(); // who begins to speak has heard enough
  const own = (recording = { began: performance.now(), held: true, source: null });
  hint.textContent = "";
  show();
  try {
    own.source = await record((level) => talk.style.setProperty("--level", Math.min(1, 2 * level).toFixed(2)));
  } catch (error) {
    return drop(error.message);
  }
  if (recording !== own) return own.source.drop();
  if (!own.held && !own.tapped) return drop("The microphone is ready now: hold the button while you speak.");
  own.began = performance.now();
  own.timer = setInterval(() => {
    const seconds = (performance.now() - own.began) / 1000;
    by("talk-words").textContent = `${clock(seconds)} ${own.held ? "· release to end" : "· tap to end"}`;
    if (seconds > model.max_audio_seconds - 0.3) finish();
  }, 100);
  by("said").textContent = "Listening";
}

function release() {
  if (!recording?.held) return;
  recording.held = false;
  if (performance.now() - recording.began < TAP) recording.tapped = true;
  else if (recording.source) finish();
}

async function finish() {
  const own = recording;
  if (!own.source) return;
  clearInterval(own.timer);
  const samples = await own.source.stop();
  if (recording !== own) return;
  recording = null;
  talk.style.removeProperty("--level");
  if (samples.length < SHORTEST * 16000) hint.textContent = "That was too short: hold the button while you speak.";
  else {
    waiting.push(await recorded(samples));
    showClips();
  }
  show();
  if (samples.length >= SHORTEST * 16000 && by("at-once").checked) send();
}

function drop(words = "") {
  clearInterval(recording?.timer);
  recording?.source?.drop();
  recording = null;
  talk.style.removeProperty("--level");
  hint.textContent = words;
  show();
}

// Files

async function take(files) {
  for (const file of files) waiting.push(await fromFile(file));
  showClips();
  text.focus();
}

function showClips() {
  clips.replaceChildren(
    ...waiting.map((clip) => {
      const element = document.createElement("li");
      const remove = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: "Remove" });
      remove.setAttribute("aria-label", `Remove ${clip.name || "recording"}`);
      remove.onclick = () => {
        waiting = waiting.filter((other) => other !== clip);
        showClips();
        text.focus();
      };
      element.append(player(clip), remove);
      return element;
    }),
  );
  show();
}

// Elements

function item(kind) {
  const element = Object.assign(document.createElement("li"), { className: kind });
  follow(() => log.append(element));
  return element;
}

function paragraph(kind, words = "") {
  return Object.assign(document.createElement("p"), { className: kind, textContent: words });
}

/** Change the log, and stay at its end if that is where the reader is. */
function follow(change) {
  const root = document.scrollingElement;
  const atEnd = root.scrollHeight - root.scrollTop - root.clientHeight < 120;
  change();
  if (atEnd) root.scrollTop = root.scrollHeight;
}

function show() {
  const focused = document.activeElement;
  by("stop").hidden = !answering;
  by("send").hidden = Boolean(answering);
  if (focused?.hidden) (answering ? by("stop") : text).focus(); // not lost with the button that was pressed
  by("send").disabled = Boolean(recording) || (!text.value.trim() && !waiting.length);
  talk.classList.toggle("live", Boolean(recording));
  talk.setAttribute("aria-pressed", String(Boolean(recording)));
  if (!recording) by("talk-words").textContent = "Hold to talk";
}

function grow() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
  show();
}

// Keys and buttons

by("composer").onsubmit = (event) => {
  event.preventDefault();
  send();
};
by("stop").onclick = stop;
by("new").onclick = () => {
  if (recording) drop();
  stop();
  turns = [];
  log.replaceChildren();
  by("welcome").hidden = false;
  text.focus();
};
by("attach").onclick = () => by("files").click();
by("files").onchange = async ({ target }) => {
  await take([...target.files]);
  target.value = "";
};
by("temperature").oninput = ({ target }) => (by("temperature-shown").textContent = target.value);
text.oninput = grow;
text.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
};

talk.onpointerdown = (event) => {
  if (event.button) return;
  talk.setPointerCapture(event.pointerId);
  press();
};
talk.onpointerup = talk.onpointercancel = release;
talk.oncontextmenu = (event) => event.preventDefault();

const talks = ({ key, target, ctrlKey, metaKey, altKey }) =>
  !ctrlKey && !metaKey && !altKey && (target === talk ? key === " " || key === "Enter" : key === " " && !target.closest("input, textarea, button, summary, dialog"));
addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (recording) drop();
    else stop();
  } else if (talks(event)) {
    event.preventDefault();
    if (!event.repeat) press();
  }
});
addEventListener("keyup", (event) => {
  if (!talks(event)) return;
  event.preventDefault();
  release();
});
addEventListener("blur", release);

let depth = 0; // dragenter and dragleave come for every element on the way
const hasFiles = ({ dataTransfer }) => dataTransfer.types.includes("Files");
addEventListener("dragenter", (event) => hasFiles(event) && (by("drop").hidden = ++depth === 0));
addEventListener("dragleave", (event) => hasFiles(event) && (by("drop").hidden = --depth <= 0));
addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  depth = 0;
  by("drop").hidden = true;
  take([...event.dataTransfer.files]);
});

show();
connect();
