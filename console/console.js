// The console: follows one project by the public routes and shows its tasks and its events.
"use strict";

const EVENTS_SHOWN = 200;
const ENDED_SHOWN = 8;
const byId = (id) => document.getElementById(id);
const element = (name, className, text) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

const parameters = new URLSearchParams(location.search);
let project = parameters.get("project") || "demo";
let socket = null;
let attempt = 0;
let paused = false;
/** Where this page stands in the project's stream: what a new connection goes on from. */
let position = null;
/** Tasks and processes by their id, the newest start last. */
let subjects = new Map();

function setConnection(state, text) {
  byId("connection").dataset.state = state;
  byId("connection").textContent = text;
}

async function connect() {
  setConnection("connecting", "connecting");
  try {
    const config = await (await fetch("/api/config")).json();
    open(config.websocket_url);
  } catch {
    retry("the service cannot be reached");
  }
}

function open(url) {
  const mine = new WebSocket(url, "tidings.v1");
  socket = mine;
  let silence = 0;
  const alive = (seconds) => {
    clearTimeout(silence);
    // A cut connection does not say that it is gone: without a heartbeat in time it is taken for lost.
    silence = setTimeout(() => mine.close(), seconds * 2500);
  };
  let interval = 30;
  mine.onmessage = ({ data }) => {
    if (mine !== socket) return;
    const message = JSON.parse(data);
    if (message.type === "connection.established") {
      interval = message.heartbeat_interval;
      attempt = 0;
      subscribe();
    }
    alive(interval);
    take(message);
  };
  mine.onclose = ({ code, reason }) => {
    clearTimeout(silence);
    if (mine !== socket) return;
    if (code >= 4400 && code <= 4499) setConnection("down", `closed: ${code} ${reason}`);
    // A node that restarts has sent its clients away one after the other: each may come back at once.
    else if (code === 1012 && attempt === 0) {
      attempt += 1;
      connect();
    } else retry(`connection lost (${code})`);
  };
}

function retry(why) {
  // Full jitter, so that a thousand pages do not come back in the same moment.
  const wait = Math.random() * Math.min(20000, 500 * 2 ** attempt++);
  setConnection("down", `${why}; trying again`);
  setTimeout(connect, wait);
}

function subscribe() {
  const message = { type: "subscribe", project_id: project };
  if (position) message.since = position;
  socket.send(JSON.stringify(message));
}

function take(message) {
  if (message.type === "subscription.confirmed" && message.project_id === project) {
    position = { epoch: message.epoch, offset: message.offset };
    setConnection("live", `live on ${message.project_id}`);
    if (message.state) {
      subjects = new Map();
      [...message.state.tasks, ...message.state.processes].reverse().forEach(fold);
      if (message.recovered === false) note("some events were missed and are not kept any more; the tasks are right");
    }
    drawTasks();
  } else if (message.type === "system.heartbeat") {
    const offset = message.positions[project];
    if (position && offset !== undefined) position.offset = offset;
  } else if (message.type === "system.degraded") {
    setConnection("down", `${message.source} cannot be heard; what comes from there will be late`);
  } else if (message.type === "system.recovered") {
    setConnection("live", `live on ${project}`);
    if (message.gap === "lost") note(`${message.source} is heard again; some of what came meanwhile may be lost`);
  } else if (message.type === "error") {
    setConnection("down", `${message.code}: ${message.message}`);
  } else if (message.offset !== undefined && (message.stream === "*" || message.project_id === project)) {
    if (message.stream !== "*" && position) position.offset = message.offset;
    fold(message);
    drawTasks();
    if (!paused) drawEvent(message);
  }
}

function fold(event) {
  const [word, verb] = event.type.split(".");
  const id = word === "task" ? event.task_id : word === "process" ? event.process_id : undefined;
  if (id === undefined || !["started", "progress", "completed", "failed"].includes(verb)) return;
  const key = `${word}:${id}`;
  const subject = subjects.get(key) ?? { name: id, percent: 0, note: "" };
  if (verb === "started") {
    subjects.delete(key);
    Object.assign(subject, { percent: 0, note: "" });
  }
  subject.name = event.task_name ?? event.started?.task_name ?? subject.name;
  subject.id = id;
  subject.state = verb === "completed" && event.outcome === "failed" ? "failed" : verb;
  if (verb === "progress") subject.percent = word === "task" ? event.progress.percentage : event.progress;
  if (verb === "completed") subject.percent = 100;
  subject.note = event.error ?? event.message ?? (verb === "completed" ? "" : subject.note);
  subjects.set(key, subject);
}

const rows = new Map();

function drawTasks() {
  const ended = [...subjects].filter(([, subject]) => ["completed", "failed"].includes(subject.state));
  ended.slice(0, -ENDED_SHOWN).forEach(([key]) => subjects.delete(key));
  for (const key of [...rows.keys()]) {
    if (!subjects.has(key)) {
      rows.get(key).remove();
      rows.delete(key);
    }
  }
  for (const [key, subject] of subjects) {
    let row = rows.get(key);
    if (!row) {
      row = element("li");
      const head = element("div", "row");
      head.append(element("span", "name"), element("span", "percent"));
      const bar = element("progress");
      bar.max = 100;
      row.append(head, bar, element("p", "note"));
      rows.set(key, row);
      byId("tasks").prepend(row);
    }
    row.dataset.state = subject.state;
    row.querySelector(".name").textContent = subject.name === subject.id ? subject.id : `${subject.name} (${subject.id})`;
    row.querySelector(".percent").textContent =
      subject.state === "progress" || subject.state === "started" ? `${Math.round(subject.percent)} %` : subject.state;
    const bar = row.querySelector("progress");
    bar.value = subject.percent;
    bar.setAttribute("aria-label", subject.name);
    row.querySelector(".note").textContent = subject.note ?? "";
  }
}

const TONES = { failed: "bad", deleted: "bad", completed: "good", created: "good", uploaded: "good", progress: "run" };
const SHOWN_ELSEWHERE = new Set(["type", "timestamp", "offset", "project_id", "stream"]);

/** What the event is about first, then everything else; a progress by its percentage alone. */
function summary(event) {
  const about = [];
  const rest = [];
  for (const [key, value] of Object.entries(event)) {
    if (SHOWN_ELSEWHERE.has(key) || value === null) continue;
    const text = typeof value === "string" ? value : value.percentage !== undefined ? `${value.percentage} %` : JSON.stringify(value);
    if (key.endsWith("_id") || key === "file_path") about.push(text);
    else rest.push(key === "message" || key === "progress" ? text : `${key}: ${text}`);
  }
  return [...about, ...rest].join(" · ").slice(0, 400);
}

function drawEvent(event) {
  const type = element("span", "", event.type);
  type.dataset.tone = TONES[event.type.split(".").pop()] ?? "";
  const time = element("time", "dim", new Date(event.timestamp).toLocaleTimeString());
  addRow([time, element("span", "dim", event.offset), type, element("span", "text", summary(event))]);
}

function note(text) {
  const line = element("span", "text", text);
  line.dataset.tone = "gap";
  addRow([element("span"), element("span"), element("span"), line]);
}

function addRow(cells) {
  const row = element("li");
  row.append(...cells);
  const list = byId("events");
  list.prepend(row);
  while (list.childElementCount > EVENTS_SHOWN) list.lastElementChild.remove();
}

byId("project").value = project;
byId("follow").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  const chosen = byId("project").value.trim();
  if (!chosen || !socket || socket.readyState !== WebSocket.OPEN) return;
  if (chosen !== project) socket.send(JSON.stringify({ type: "unsubscribe", project_id: project }));
  project = chosen;
  position = null;
  subjects = new Map();
  byId("events").replaceChildren();
  drawTasks();
  history.replaceState(null, "", `?project=${encodeURIComponent(project)}`);
  subscribe();
});
byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", String(paused));
  byId("pause").textContent = paused ? "Go on" : "Pause";
});
connect();
