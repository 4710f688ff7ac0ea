// Tabs and theme. A tab is built when it is first shown.

const tabs = { overview: () => () => {}, passes: passesTab, timeline: timelineTab, memory: memoryTab, graph: graphTab, kernels: kernelsTab };
const built = {};

function showTab() {
  const tab = state.tab in tabs ? state.tab : "overview";
  for (const each of Object.keys(tabs)) {
    $(each).hidden = each !== tab;
    $(`tab-${each}`).setAttribute("aria-selected", String(each === tab));
    $(`tab-${each}`).tabIndex = each === tab ? 0 : -1;
  }
  hideTip();
  built[tab] ??= tabs[tab]();
  built[tab]();
}

/** Arrow keys move between tabs, as readers of screens expect. */
function tabKey(event) {
  const names = Object.keys(tabs), step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const next = names[(names.indexOf(state.tab) + step + names.length) % names.length];
  go({ tab: next });
  $(`tab-${next}`).focus();
}

const themes = ["auto", "light", "dark"];

function showTheme() {
  const theme = themes.includes(state.theme) ? state.theme : "auto";
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = `theme: ${theme}`;
  colours.clear();
  spansView.draw();
  aliveView.draw();
}

document.documentElement.classList.add("live");
document.querySelectorAll("[data-tab]").forEach((b) => b.addEventListener("click", () => go({ tab: b.dataset.tab })));
document.querySelector("nav").addEventListener("keydown", tabKey);
$("theme").addEventListener("click", () => go({ theme: themes[(themes.indexOf(state.theme) + 1) % 3] }));
watch(["tab"], showTab);
watch(["theme"], showTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
window.addEventListener("beforeprint", () => {
  for (const tab of Object.keys(tabs)) {
    $(tab).hidden = false;
    (built[tab] ??= tabs[tab]())();
  }
});
window.addEventListener("afterprint", showTab);
showTheme();
showTab();
searchBox();
