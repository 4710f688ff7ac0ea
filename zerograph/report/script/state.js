// What is shown, kept in the address after the #, so that a view can be linked.

const initial = {
  tab: "overview", pass: data.passes.at(-1).name, view: "split", form: "skeleton", line: "",
  region: "all", axis: "order", block: "", q: "", theme: "auto",
};
const state = { ...initial, ...fromHash() };
const watchers = [];

function fromHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  return Object.fromEntries([...given].filter(([key]) => key in initial));
}

/** Call `action` when one of `keys` has changed. */
function watch(keys, action) {
  watchers.push({ keys, action });
}

function notify(changed) {
  for (const { keys, action } of watchers) if (keys.some((key) => changed.includes(key))) action();
}

/** Change the state, the address and the page. A new tab or pass is a step that Back undoes. */
function go(changes) {
  const changed = Object.keys(changes).filter((key) => state[key] !== changes[key]);
  if (!changed.length) return;
  Object.assign(state, changes);
  const shown = Object.entries(state).filter(([key, value]) => value !== initial[key]);
  const hash = `#${new URLSearchParams(shown)}`;
  const step = changed.includes("tab") || changed.includes("pass");
  history[step ? "pushState" : "replaceState"](null, "", hash);
  notify(changed);
}

window.addEventListener("popstate", () => {
  const before = { ...state };
  Object.assign(state, initial, fromHash());
  notify(Object.keys(initial).filter((key) => before[key] !== state[key]));
});

/** Buttons of which one is pressed: `data-<key>` holds the value. */
function switches(root, key) {
  const buttons = [...root.querySelectorAll(`[data-${key}]`)];
  const show = () => buttons.forEach((b) => b.setAttribute("aria-pressed", b.dataset[key] === state[key]));
  buttons.forEach((b) => b.addEventListener("click", () => go({ [key]: b.dataset[key] })));
  watch([key], show);
  show();
}
