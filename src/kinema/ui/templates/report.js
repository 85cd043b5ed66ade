// Videos play while they are in view; for readers who ask for less motion they stand still and have controls.
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
const videos = document.querySelectorAll("video");
if (still) {
  for (const video of videos) { video.autoplay = false; video.pause(); video.controls = true; }
} else if ("IntersectionObserver" in window) {
  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) target.play().catch(() => {}); else target.pause();
    }
  }, { rootMargin: "200px" });
  for (const video of videos) watch.observe(video);
}

// Charts say the values at the step under the pointer.
for (const plot of document.querySelectorAll(".plot")) {
  const from = Number(plot.dataset.from), to = Number(plot.dataset.to);
  const lines = JSON.parse(plot.dataset.lines);
  const cursor = plot.querySelector(".cursor"), output = plot.querySelector("output");
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const at = from + Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)) * (to - from);
    const nearest = lines.map(([name, points]) => {
      const point = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
      return { name, step: point[0], value: point[1] };
    });
    const share = to > from ? (nearest[0].step - from) / (to - from) : 0.5;
    output.textContent = [`step ${nearest[0].step}`,
      ...nearest.map(({ name, value }) => `${name}  ${Number(value.toPrecision(4))}`)].join("\n");
    cursor.style.left = `${100 * share}%`;
    output.style.left = share < 0.5 ? `calc(${100 * share}% + 8px)` : "auto";
    output.style.right = share < 0.5 ? "auto" : `calc(${100 * (1 - share)}% + 8px)`;
    cursor.hidden = output.hidden = false;
  });
  plot.addEventListener("pointerleave", () => { cursor.hidden = output.hidden = true; });
}

// The filter reaches the samples that are folded away.
document.querySelector("#only-missed")?.addEventListener("change", (event) => {
  const rest = document.querySelector("#samples details");
  if (rest && event.target.checked) rest.open = true;
});
