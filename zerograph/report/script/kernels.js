// The sources of generated kernels.

function kernelsTab() {
  const found = Object.entries(data.kernels);
  const none = make("p", { class: "muted" }, "This plan has no generated kernels: every node runs an operator of torch or a collective.");
  $("sources").replaceChildren(...(found.length ? found.map(([title, source]) =>
    make("article", { class: "kernel" }, make("h3", {}, title), make("pre", { tabindex: "0", "aria-label": title }, source))) : [none]));
  return () => {};
}
