// The keys of the pages, live texts, and forms that are sent once. Each key does what a visible control does.
"use strict";

const STORED = "sortd-keys-off";
const ANSWERED = "sortd-answered-at";
const SEEN_MILLISECONDS = 400; // a second press within this time was meant for the page before
const NATIVE = "a, button, summary, select, textarea, dialog *";

const grid = document.querySelector("[data-grid]");
const boxes = grid ? [...grid.querySelectorAll("input[type=checkbox]")] : [];
const help = document.getElementById("keys");
const usesKeys = document.getElementById("keys-on");
let anchor = 0; // where a range begins

function keysAreOff() {
  try {
    return localStorage.getItem(STORED) === "1";
  } catch {
    return false; // storage may be forbidden
  }
}

function controlOf(key) {
  return [...document.querySelectorAll("[data-key]")].find((one) => one.dataset.key === key && !one.disabled);
}

// Let keys answer once the page could have been seen, if a key answered the page before.
function acceptKeys() {
  let left = 0;
  try {
    left = Number(sessionStorage.getItem(ANSWERED)) + SEEN_MILLISECONDS - Date.now();
  } catch {
    // storage may be forbidden: no answer of the page before is known
  }
  const root = document.documentElement;
  delete root.dataset.keys;
  setTimeout(() => (root.dataset.keys = "ready"), Math.min(Math.max(left, 0), SEEN_MILLISECONDS));
}

function answer(control) {
  if (document.documentElement.dataset.keys !== "ready") return;
  try {
    if (control.matches("button")) sessionStorage.setItem(ANSWERED, Date.now());
  } catch {
    // as above
  }
  control.click();
}

// ---------------------------------------------------------------- selection

function showSelected() {
  const selected = boxes.filter((box) => box.checked).length;
  for (const text of document.querySelectorAll("[data-selected]")) {
    text.textContent = text.dataset.selected.replace("##", boxes.length).replace("#", selected);
  }
}

function focusOn(index) {
  boxes[index].focus();
  boxes[index].closest(".shown, li").scrollIntoView({ block: "nearest" });
}

function selectRange(from, to, checked) {
  for (let index = Math.min(from, to); index <= Math.max(from, to); index += 1) boxes[index].checked = checked;
  showSelected();
}

// Return the box above (-1) or below (+1) one: the nearest of the next row in that direction.
function inNextRow(index, direction) {
  const middle = (box) => box.left + box.width / 2;
  const places = boxes.map((box) => box.closest(".shown, li").getBoundingClientRect());
  const here = places[index];
  const beyond = places
    .map((place, at) => ({ place, at, down: (place.top - here.top) * direction }))
    .filter((one) => one.down > 4);
  if (!beyond.length) return index;
  const nearest = Math.min(...beyond.map((one) => one.down));
  const row = beyond.filter((one) => one.down < nearest + 4);
  row.sort((one, other) => Math.abs(middle(one.place) - middle(here)) - Math.abs(middle(other.place) - middle(here)));
  return row[0].at;
}

function target(key, index) {
  const last = boxes.length - 1;
  const to = {
    ArrowLeft: () => Math.max(0, index - 1),
    ArrowRight: () => Math.min(last, index + 1),
    ArrowUp: () => inNextRow(index, -1),
    ArrowDown: () => inNextRow(index, 1),
    Home: () => 0,
    End: () => last,
  }[key];
  return to ? to() : undefined;
}

function moveFocus(event) {
  const index = boxes.indexOf(document.activeElement);
  const to = index < 0 ? 0 : target(event.key, index);
  if (event.shiftKey && index >= 0) {
    selectRange(anchor, to, boxes[anchor].checked);
  } else {
    anchor = to;
  }
  focusOn(to);
}

if (grid) {
  let shifted = false;
  grid.addEventListener("click", (event) => {
    // A click on a picture reaches its box as a second click, without the state of the shift key in every browser.
    if (event.target.closest("label") && !boxes.includes(event.target)) shifted = event.shiftKey;
  });
  grid.addEventListener("mousedown", (event) => {
    if (event.shiftKey) event.preventDefault(); // no selection of text
  });
  for (const [index, box] of boxes.entries()) {
    box.addEventListener("click", (event) => {
      if (event.shiftKey || shifted) selectRange(anchor, index, box.checked);
      else anchor = index;
      shifted = false;
      showSelected();
    });
  }
}

// ---------------------------------------------------------------- keys

const special = {
  "?": () => help.showModal(),
  a: () => {
    const all = boxes.every((box) => box.checked);
    for (const box of boxes) box.checked = !all;
    showSelected();
  },
  o: () => {
    const box = boxes.includes(document.activeElement) ? document.activeElement : boxes[0];
    box?.closest(".shown, li").querySelector("[data-open]")?.click();
  },
};

function press(event) {
  const active = document.activeElement;
  const isField = active.matches("input:not([type=checkbox]), textarea, select");
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing || event.defaultPrevented) return;
  if (isField) return inField(event, active);
  if (help.open) return undefined; // Escape and Enter are the dialog's own
  if (event.key === "Escape") return active.blur();
  if (keysAreOff() || (event.repeat && !event.key.startsWith("Arrow"))) return undefined;
  if (boxes.length && target(event.key, 0) !== undefined && !active.matches(NATIVE)) {
    moveFocus(event);
  } else if (event.key === "Enter" && active.matches(NATIVE)) {
    return undefined; // the focused control is meant
  } else if (special[event.key]) {
    special[event.key]();
  } else {
    const control = controlOf(event.key);
    if (!control && event.key !== "Enter") return undefined;
    if (control?.matches("input")) control.focus();
    else if (control) answer(control);
  }
  return event.preventDefault();
}

function inField(event, field) {
  if (event.key === "Escape") {
    if (boxes.length) focusOn(Math.min(anchor, boxes.length - 1));
    else field.blur();
    event.preventDefault();
  } else if (event.key === "Enter") {
    // Without this the first button of the form would be pressed, whatever it is.
    const button = field.form?.querySelector(`[data-for="${field.id}"]`);
    if (field.value.trim()) button?.click();
    event.preventDefault();
  }
}

document.addEventListener("keydown", press);
for (const button of document.querySelectorAll("[data-opens]")) {
  button.addEventListener("click", () => document.getElementById(button.dataset.opens).showModal());
}
usesKeys.checked = !keysAreOff();
usesKeys.addEventListener("change", () => {
  try {
    localStorage.setItem(STORED, usesKeys.checked ? "0" : "1");
  } catch {
    usesKeys.checked = true; // not stored: the keys stay on
  }
});

// ---------------------------------------------------------------- forms

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.method === "dialog") return;
  if (form.dataset.sent) {
    event.preventDefault();
    return;
  }
  form.dataset.sent = "yes";
  // Later, since a disabled button is not sent.
  setTimeout(() => {
    for (const button of form.elements) if (button.matches("button")) button.disabled = true;
  });
});
window.addEventListener("pageshow", () => {
  for (const form of document.forms) {
    delete form.dataset.sent;
    for (const button of form.elements) if (button.matches("button")) button.disabled = false;
  }
  showSelected();
});

// ---------------------------------------------------------------- live texts

let source;

// Browsers open six connections to a server at most: that of a tab which nobody sees is closed.
function listen() {
  if (source || document.hidden || !document.body.dataset.events) return;
  source = new EventSource(document.body.dataset.events);
  source.addEventListener("message", (event) => {
    for (const [name, text] of Object.entries(JSON.parse(event.data))) {
      for (const one of document.querySelectorAll(`[data-live="${CSS.escape(name)}"]`)) {
        if (one.textContent !== text) one.textContent = text;
      }
    }
  });
}

function leave() {
  source?.close();
  source = undefined;
}

window.addEventListener("pageshow", listen);
window.addEventListener("pageshow", acceptKeys);
window.addEventListener("pagehide", leave);
document.addEventListener("visibilitychange", () => (document.hidden ? leave() : listen()));

for (const one of document.querySelectorAll(".needs-script")) one.hidden = false;
showSelected();
