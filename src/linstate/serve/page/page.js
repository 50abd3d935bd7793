// The page: chat on the left, the library of states on the right. No framework, no build.
"use strict";

const $ = (id) => document.getElementById(id);
const panes = [{ list: $("talk"), state: null, lines: [] }, { list: $("other"), state: null, lines: [] }];
let states = [], model = null, asking = null, reading = null;

// ---------------------------------------------------------------------------------------------- talking to the server

const keyed = (more = {}) => {
  const key = sessionStorage.getItem("key");
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
};

async function call(method, path, body, { signal, raw } = {}) {
  const json = body !== undefined && !(body instanceof Blob) && !(body instanceof FormData);
  const answer = await fetch(path, {
    method, signal, body: json ? JSON.stringify(body) : body,
    headers: keyed(json ? { "content-type": "application/json" } : {}),
  });
  if (!answer.ok) {
    if (answer.status === 401) $("key-form").hidden = false;
    let said = `${answer.status} ${answer.statusText}`;
    try { said = (await answer.json()).error.message; } catch { /* no JSON */ }
    throw new Error(said);
  }
  return raw ? answer : answer.json();
}

// Server-sent events of an answer, as objects.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((l) => l.startsWith("data: ")).map((l) => l.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

const complain = (error) => { if (error.name !== "AbortError") $("said").textContent = error.message ?? error; };
const quietly = (work) => async (...given) => {
  $("said").textContent = "";
  try { return await work(...given); } catch (error) { complain(error); }
};

// ---------------------------------------------------------------------------------------------------------- numbers

const size = (bytes) => {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (bytes < 999.5 || unit === "GB") return `${bytes < 9.95 && unit !== "B" ? bytes.toFixed(1) : Math.round(bytes)} ${unit}`;
    bytes /= 1000;
  }
};
const count = (n) => n.toLocaleString("en");
const called = (state) => state.name ?? `unnamed ${state.id.slice(0, 6)}`;

// ---------------------------------------------------------------------------------------------------------- library

async function refresh() {
  states = (await call("GET", "/v1/states?limit=500")).data;
  $("key-form").hidden = true;
  draw();
}

// What goes on from a state stands under it: a single way on at the same depth, several as branches.
function draw() {
  const wanted = $("filter").value.trim().toLowerCase();
  const byId = new Map(states.map((s) => [s.id, s]));
  const children = new Map();
  for (const state of states) {
    const parent = byId.has(state.parent) ? state.parent : null;
    children.set(parent, [...(children.get(parent) ?? []), state]);
  }
  const matches = (state) => !wanted || called(state).toLowerCase().includes(wanted)
    || (children.get(state.id) ?? []).some(matches);
  const focused = document.activeElement?.closest?.("#tree li")?.dataset.id;
  const rows = [];
  const walk = (parent, prefix, level) => {
    const shown = (children.get(parent) ?? []).filter(matches);
    shown.forEach((state, i) => {
      if (parent && shown.length === 1) {
        rows.push(row(state, `${prefix}↳ `, level));
        walk(state.id, prefix, level);
        return;
      }
      const last = i === shown.length - 1;
      rows.push(row(state, parent ? prefix + (last ? "└─" : "├─") : "", level));
      walk(state.id, parent ? prefix + (last ? "  " : "│ ") : "", level + 1);
    });
  };
  walk(null, "", 0);
  $("tree").replaceChildren(...rows);
  $("empty").hidden = states.length > 0;
  if (focused) $("tree").querySelector(`li[data-id="${focused}"] .state`)?.focus();
}

function row(state, branch, level) {
  const item = $("state").content.firstElementChild.cloneNode(true);
  item.dataset.id = state.id;
  item.setAttribute("aria-level", level + 1);
  const box = item.querySelector(".state");
  box.querySelector(".branch").textContent = branch;
  box.querySelector(".name").textContent = called(state);
  box.querySelector(".name").classList.toggle("unnamed", !state.name);
  box.querySelector(".numbers").textContent = `${count(state.position)} tokens in ${size(state.bytes)}`;
  if (panes.some((p) => p.state?.id === state.id)) box.setAttribute("aria-current", "true");
  box.addEventListener("click", quietly((event) => {
    const what = event.target.dataset?.do;
    return what ? actions[what](state) : open(state);
  }));
  box.addEventListener("keydown", quietly((event) => {
    if (event.target !== box) return;
    const what = { r: "rename", f: "fork", c: "compare", e: "export", Delete: "delete" }[event.key];
    if (what) { event.preventDefault(); return actions[what](state); }
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); return open(state); }
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const boxes = [...$("tree").querySelectorAll(".state")];
    boxes[boxes.indexOf(box) + step]?.focus();
  }));
  return item;
}

const actions = {
  async rename(state) {
    const name = prompt("Name of this state", state.name ?? "")?.trim();
    if (!name || name === state.name) return;
    replace(await call("PATCH", `/v1/states/${state.id}`, { name }));
    await refresh();
    about();
  },
  async fork(state) {
    const fork = await call("POST", `/v1/states/${state.id}/fork`, { name: freeName(`${called(state)} (fork)`) });
    const lines = panes.find((p) => p.state?.id === state.id)?.lines ?? [];
    await refresh();
    open(fork, 0, lines);
  },
  async compare(state) {
    if (!panes[0].state || panes[0].state.id === state.id) throw new Error("Open one state, then compare it with another.");
    open(state, 1);
  },
  async export(state) {
    const answer = await call("GET", `/v1/states/${state.id}/export`, undefined, { raw: true });
    const link = Object.assign(document.createElement("a"), {
      href: URL.createObjectURL(await answer.blob()), download: `${called(state).replace(/[^\w.-]+/g, "-")}.state`,
    });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  },
  async delete(state) {
    if (!confirm(`Delete “${called(state)}”?`)) return;
    await call("DELETE", `/v1/states/${state.id}`);
    panes.forEach((pane, i) => { if (pane.state?.id === state.id) close(i); });
    await refresh();
    about();
  },
};

function freeName(wanted) {
  const taken = new Set(states.map((s) => s.name));
  for (let n = 1, name = wanted.slice(0, 190); ; name = `${wanted.slice(0, 190)} ${++n}`) if (!taken.has(name)) return name;
}

function replace(state) {
  for (const pane of panes) if (pane.state?.id === state.id) pane.state = state;
}

// ------------------------------------------------------------------------------------------------------------- chat

function open(state, which = 0, lines = []) {
  if (which === 0) close(1);
  panes[which].state = state;
  panes[which].lines = [...lines];
  showLibrary(false);
  paint();
  draw();
  about();
  if (matchMedia("(hover: hover)").matches) $("question").focus();
}

function close(which) {
  panes[which].state = null;
  panes[which].lines = [];
  paint();
}

function paint() {
  const two = panes[1].state !== null;
  $("panes").classList.toggle("two", two);
  $("other").hidden = !two;
  for (const pane of panes) {
    const parts = [];
    if (two && pane.state) parts.push(Object.assign(document.createElement("h2"), { textContent: called(pane.state) }));
    if (!pane.lines.length && !two) {
      const hint = Object.assign(document.createElement("li"), { className: "hint" });
      hint.append(pane.state
        ? "Ask what was read; the answer is kept as a new state, so you can come back to every point. Lines above the last line of a question are read first."
        : "Open a state on the right, or just ask: the conversation is kept as a state.");
      parts.push(hint);
    }
    pane.list.replaceChildren(...parts, ...pane.lines.map((l) => l.item));
    pane.list.scrollTop = pane.list.scrollHeight;
  }
}

function line(pane, kind, text) {
  const item = Object.assign(document.createElement("li"), { className: kind, textContent: text });
  pane.lines.push({ item });
  paint();
  return item;
}

function about() {
  const box = $("about"), state = panes[0].state;
  box.replaceChildren();
  if (!state) { box.append(Object.assign(document.createElement("span"), { className: "quiet", textContent: "Nothing is open." })); return; }
  const title = Object.assign(document.createElement("strong"), { textContent: called(state) });
  const more = Object.assign(document.createElement("span"), { className: "quiet", textContent: ` ${count(state.position)} tokens read ` });
  const leave = Object.assign(document.createElement("button"), { className: "link", textContent: "close", type: "button" });
  leave.addEventListener("click", () => { close(1); close(0); draw(); about(); });
  const bars = Object.assign(document.createElement("div"), { className: "bars" });
  const most = Math.max(state.bytes, state.kv_cache_bytes);
  for (const [name, bytes, kind] of [["state", state.bytes, "bar"], ["KV cache it replaces", state.kv_cache_bytes, "bar kv"]]) {
    const bar = Object.assign(document.createElement("div"), { className: kind });
    bar.style.width = `${(100 * bytes) / most}%`;
    const label = (text) => Object.assign(document.createElement("span"), { textContent: text });
    bars.append(label(name), bar, label(size(bytes)));
  }
  box.append(title, more, leave, bars);
}

async function answer(pane, question, signal) {
  line(pane, "you", question);
  const item = line(pane, "answer busy", "");
  const began = performance.now();
  let tokens = 0, usage = null, kept = null, first = null;
  try {
    const stream = await call("POST", "/v1/chat/completions", {
      messages: [{ role: "user", content: question }], stream: true, store: true, max_tokens: 256,
      stream_options: { include_usage: true }, ...(pane.state ? { state: pane.state.id } : {}),
    }, { raw: true, signal });
    for await (const chunk of events(stream)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      kept = chunk.state ?? kept;
      const text = chunk.choices[0]?.delta?.content;
      if (!text) continue;
      first ??= performance.now();
      tokens += 1;
      item.append(text);
      pane.list.scrollTop = pane.list.scrollHeight;
    }
  } finally {
    item.classList.remove("busy");
  }
  const seconds = (performance.now() - began) / 1000;
  const made = usage?.completion_tokens ?? tokens;
  const fresh = usage ? usage.prompt_tokens - (pane.state?.position ?? 0) : 0;
  const wait = Math.round((first ?? performance.now()) - began);
  const rate = first ? made / Math.max(0.001, (performance.now() - first) / 1000) : 0;
  $("speed").textContent = `${rate ? rate.toFixed(0) : "–"} tokens/s · first after ${wait} ms`;
  item.append(Object.assign(document.createElement("small"), {
    textContent: usage ? `${count(fresh)} new tokens behind ${count(usage.prompt_tokens - fresh)} kept ones, ${seconds.toFixed(2)} s` : "",
  }));
  if (!item.firstChild?.data) item.prepend("(nothing)");
  return kept;
}

const ask = quietly(async () => {
  const question = $("question").value.trimEnd();
  if (!question.trim() || asking) return;
  asking = new AbortController();
  $("question").value = "";
  grow();
  $("send").hidden = true;
  $("stop").hidden = false;
  try {
    const open_ = panes.filter((p, i) => i === 0 || p.state);
    const kept = await Promise.all(open_.map((pane) => answer(pane, question, asking.signal)));
    await refresh();
    // Going on: each pane now stands on the state behind its answer, which takes its name along.
    for (const [i, pane] of open_.entries()) await goOn(pane, kept[i]);
    await refresh();
    paint();
  } finally {
    asking = null;
    $("send").hidden = false;
    $("stop").hidden = true;
  }
  about();
});

async function goOn(pane, id) {
  if (!id) return;
  const before = pane.state;
  const name = before ? freeName(`${called(before).replace(/ · turn \d+$/, "")} · turn ${turns(before) + 1}`) : freeName("conversation · turn 1");
  pane.state = await call("PATCH", `/v1/states/${id}`, { name });
}
const turns = (state) => Number(/ · turn (\d+)( \d+)?$/.exec(state.name ?? "")?.[1] ?? 0);

// ----------------------------------------------------------------------------------------------------------- reading

async function read(body, what) {
  if (reading) throw new Error("Another text is being read.");
  reading = new AbortController();
  $("reading").hidden = false;
  $("reading-what").textContent = `Reading ${what}`;
  $("progress").removeAttribute("value");
  $("reading-numbers").textContent = "";
  try {
    const stream = await call("POST", "/v1/states", body, { raw: true, signal: reading.signal });
    for await (const step of events(stream)) {
      if (step.type === "error") throw new Error(step.message);
      if (step.object === "state.progress") {
        $("progress").value = step.done / step.total;
        $("reading-numbers").textContent = `${count(step.done)} of ${count(step.total)} tokens, ${count(step.tokens_per_second)} tokens/s`;
      } else if (step.object === "state") {
        const { tokens, seconds } = step.read;
        $("speed").textContent = `read ${count(tokens)} tokens in ${seconds.toFixed(2)} s`;
        await refresh();
        open(step);
      }
    }
  } finally {
    reading = null;
    $("reading").hidden = true;
  }
}

const readFile = quietly(async (file) => {
  if (file.name.endsWith(".state")) return importFile(file);
  const form = new FormData();
  form.append("name", freeName(file.name));
  form.append("stream", "true");
  form.append("file", file);
  await read(form, file.name);
});

const importFile = quietly(async (file) => {
  const name = freeName(file.name.replace(/\.state$/, ""));
  const state = await call("POST", `/v1/states/import?name=${encodeURIComponent(name)}`, file);
  await refresh();
  open(state);
});

// ------------------------------------------------------------------------------------------------------------ events

const grow = () => {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
};
function showLibrary(shown) {
  $("library").classList.toggle("shown", shown);
  $("show-library").setAttribute("aria-expanded", shown);
  $("show-library").textContent = shown ? "Chat" : "Library";
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
});
$("question").addEventListener("input", grow);
$("stop").addEventListener("click", () => asking?.abort());
$("reading-stop").addEventListener("click", () => reading?.abort());
$("show-library").addEventListener("click", () => showLibrary(!$("library").classList.contains("shown")));
$("filter").addEventListener("input", draw);
$("find").addEventListener("submit", quietly(async (event) => {
  event.preventDefault();
  const query = $("filter").value.trim();
  if (!query) return;
  const { data } = await call("POST", "/v1/states/search", { query });
  $("found").replaceChildren(...data.map(({ state, passage }) => {
    const item = document.createElement("li");
    const name = Object.assign(document.createElement("button"), { type: "button", className: "link", textContent: called(state) });
    name.addEventListener("click", () => { $("filter").value = ""; $("found").replaceChildren(); draw(); open(state); });
    item.append(name, Object.assign(document.createElement("p"), { className: "quiet", textContent: passage }));
    return item;
  }));
  if (!data.length) $("found").replaceChildren(Object.assign(document.createElement("li"), { className: "quiet", textContent: "Nothing was found in what was read." }));
}));
$("filter").addEventListener("input", () => { if (!$("filter").value) $("found").replaceChildren(); });
$("file").addEventListener("change", (event) => { const [file] = event.target.files; event.target.value = ""; if (file) readFile(file); });
$("import").addEventListener("change", (event) => { const [file] = event.target.files; event.target.value = ""; if (file) importFile(file); });
$("paste").addEventListener("click", () => { $("pasted").hidden = !$("pasted").hidden; if (!$("pasted").hidden) $("text").focus(); });
$("pasted").addEventListener("submit", quietly(async (event) => {
  event.preventDefault();
  const text = $("text").value;
  if (!text.trim()) return;
  const name = freeName($("text-name").value.trim() || text.trim().split("\n")[0].trim().slice(0, 40));
  $("pasted").hidden = true;
  $("text").value = $("text-name").value = "";
  await read({ text, name, stream: true }, name);
}));
$("key-form").addEventListener("submit", quietly(async (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value.trim());
  await begin();
}));
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) readFile(event.dataTransfer.files[0]);
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { if (asking) asking.abort(); else showLibrary(false); }
  if (event.key === "/" && !/^(INPUT|TEXTAREA)$/.test(event.target.tagName)) { event.preventDefault(); $("question").focus(); }
});

const begin = quietly(async () => {
  model = (await call("GET", "/v1/models")).data[0];
  $("model").textContent = `${model.id}, ${(model.parameters / 1e6).toFixed(1)} M weights, a state has ${size(model.state_bytes)}`;
  await refresh();
});
paint();
about();
begin();
