"use strict";
// Polls while the page is seen, draws the charts, copies commands. Everything that is read is in the page without it.
(() => {
  const POLL_MILLISECONDS = 2000;
  const CHART_MILLISECONDS = 3000;
  const notice = document.getElementById("notice");
  let away = false;

  setInterval(() => {
    if (document.visibilityState === "visible") document.body.dispatchEvent(new CustomEvent("poll"));
  }, POLL_MILLISECONDS);

  // A part that somebody is typing in, or has opened, waits for its new content: the whole page is asked for then.
  let waiting = false;
  document.addEventListener("htmx:oobBeforeSwap", (event) => {
    const part = event.detail.target;
    const busy = part.contains(document.activeElement) && document.activeElement.matches("input, textarea, select");
    if (busy || part.querySelector(".actions details[open]")) {
      event.detail.shouldSwap = false;
      waiting = true;
    }
  });
  document.addEventListener("htmx:configRequest", (event) => {
    if (event.target.id !== "poller" || !waiting) return;
    waiting = false;
    event.detail.path = event.detail.path.replace(/([?&])seen=[^&]*/, "$1seen=");
  });

  const say = (text) => {
    const box = document.createElement("div");
    box.className = "alert";
    box.textContent = text;
    notice.replaceChildren(box);
  };
  const missed = () => {
    away = true;
    say("The service does not answer; what is shown may be old. It is asked again every two seconds.");
  };
  const isPoll = (detail) => detail.requestConfig?.triggeringEvent?.type === "poll";
  document.addEventListener("htmx:sendError", missed);
  document.addEventListener("htmx:responseError", (event) => {
    if (isPoll(event.detail)) { missed(); return; }
    // The service has escaped it.
    notice.innerHTML = event.detail.xhr.responseText;
    notice.scrollIntoView({ block: "nearest" });
  });
  document.addEventListener("htmx:configRequest", (event) => {
    if (!event.target.hasAttribute("data-omit-empty")) return;
    for (const [name, value] of [...event.detail.formData.entries()]) if (value === "") event.detail.formData.delete(name);
  });
  document.addEventListener("htmx:xhr:progress", (event) => {
    const bar = event.target.querySelector?.("form progress, progress[aria-label='upload']");
    if (!bar || !event.detail.lengthComputable) return;
    bar.hidden = false;
    bar.value = (100 * event.detail.loaded) / event.detail.total;
  });
  document.addEventListener("htmx:afterRequest", (event) => {
    if (event.detail.successful && away) {
      away = false;
      notice.replaceChildren();
    }
  });

  document.addEventListener("submit", (event) => {
    if (event.target.method === "post" && !event.target.hasAttribute("hx-post")) {
      // After the browser has read the fields.
      setTimeout(() => event.target.querySelectorAll("button").forEach((each) => { each.disabled = true; }), 0);
    }
  });
  addEventListener("pageshow", () => document.querySelectorAll("button:disabled").forEach((each) => { each.disabled = false; }));

  const showCopyButtons = () => {
    if (navigator.clipboard) document.querySelectorAll("button.copy[hidden]").forEach((each) => { each.hidden = false; });
  };
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button.copy");
    if (!button) return;
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });

  const log = () => document.querySelector("pre.log");
  const scrollLog = () => { const box = log(); if (box) box.scrollTop = box.scrollHeight; };
  let logAtEnd = true;
  document.addEventListener("htmx:beforeSwap", (event) => {
    const box = log();
    if (box && event.target.id === "log-more") logAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  });

  // What the check of a form says stands beside its fields too.
  const markFields = (plan) => {
    const details = new Map([...plan.querySelectorAll("[data-pointer]")].map((each) => [each.dataset.pointer, each.dataset.detail]));
    document.querySelectorAll("[data-error-of]").forEach((place) => {
      const detail = details.get(place.dataset.errorOf) ?? "";
      const field = document.getElementById(place.id.replace(/-error$/, ""));
      // Nobody is told that a field is missing before having been there.
      const shown = detail && (field.value || field.dataset.visited) ? detail : "";
      if (place.textContent !== shown) place.textContent = shown;
      if (shown) field.setAttribute("aria-invalid", "true"); else field.removeAttribute("aria-invalid");
    });
  };
  document.addEventListener("focusout", (event) => { if (event.target.dataset) event.target.dataset.visited = "1"; });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("#plan a[href^='#field']");
    if (!link) return;
    const field = document.getElementById(link.hash.slice(1));
    const section = field?.closest("details");
    if (section) section.open = true;
    field?.focus();
  });

  // --- Charts ---
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const plots = new Map();
  let curves = null;
  let drawnAt = 0;

  const bandsPlugin = (bands) => ({
    hooks: {
      drawClear: (plot) => {
        const { ctx, bbox } = plot;
        bands.forEach((band, index) => {
          const left = Math.max(plot.valToPos(band.from, "x", true), bbox.left);
          const right = Math.min(plot.valToPos(band.to, "x", true), bbox.left + bbox.width);
          if (right <= left) return;
          ctx.fillStyle = color(`--band-${(index % 4) + 1}`);
          ctx.fillRect(left, bbox.top, right - left, bbox.height);
          ctx.fillStyle = color("--muted");
          ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
          if (right - left > ctx.measureText(band.label).width + 8 * devicePixelRatio)
            ctx.fillText(band.label, left + 4 * devicePixelRatio, bbox.top + 13 * devicePixelRatio);
        });
      },
    },
  });

  // Above the lines there is room for the names of the stages.
  const withRoom = (_, low, high) => {
    const span = high - low || Math.abs(high) || 1;
    return [low >= 0 ? Math.max(0, low - 0.06 * span) : low - 0.06 * span, high + 0.18 * span];
  };

  const draw = (box, chart, bands) => {
    plots.get(box)?.destroy();
    plots.delete(box);
    if (!chart.x.length) {
      box.className = "chart chart-empty";
      box.textContent = "Nothing is measured.";
      return;
    }
    box.className = "chart";
    box.replaceChildren();
    const last = Math.max(bands.length ? bands[bands.length - 1].to : 0, chart.x[chart.x.length - 1]);
    // A level goes on to the planned end.
    const steps = chart.levels.length && chart.x[chart.x.length - 1] < last ? [...chart.x, last] : chart.x;
    const levels = chart.levels.map((level) => ({ label: level.label, values: steps.map(() => level.value), dash: [6, 4] }));
    const lines = [...chart.series.map((each) => ({ ...each, values: steps.map((_, at) => each.values[at] ?? null) })), ...levels];
    const axis = { stroke: color("--muted"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
    const few = chart.x.length < 30;
    plots.set(box, new uPlot({
      width: box.clientWidth,
      height: 210,
      plugins: [bandsPlugin(bands)],
      scales: { x: { time: false, range: () => [0, Math.max(last, 1)] }, y: { range: withRoom } },
      axes: [{ ...axis, label: "optimiser step", labelSize: 18, labelFont: "12px system-ui, sans-serif", size: 34 }, { ...axis, size: 48 }],
      cursor: { y: false, drag: { x: false, y: false } },
      series: [{ label: "\u00a0", value: (_, value) => (value == null ? "" : `step ${value}`) }, ...lines.map((line, index) => ({
        label: line.label, stroke: color(`--line-${(index % 6) + 1}`), width: index ? 1.25 : 1.75, dash: line.dash,
        spanGaps: true, points: { show: few && !line.dash, size: 5 },
        value: (_, value) => (value == null ? "" : Number(value.toPrecision(4)).toString()),
      }))],
    }, [steps, ...lines.map((line) => line.values)], box));
  };

  const drawAll = () => {
    if (!curves) return;
    document.querySelectorAll("[data-chart]").forEach((box) => draw(box, curves[box.dataset.chart], curves.bands));
  };
  const fetchCurves = async () => {
    const section = document.querySelector("[data-curves]");
    if (!section || !window.uPlot || Date.now() - drawnAt < CHART_MILLISECONDS) return;
    drawnAt = Date.now();
    try {
      const response = await fetch(section.dataset.curves, { headers: { accept: "application/json" } });
      if (response.ok) { curves = await response.json(); drawAll(); }
    } catch { missed(); }
  };
  dark.addEventListener("change", drawAll);
  let resizing = 0;
  addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(drawAll, 150); });

  document.addEventListener("htmx:afterSettle", (event) => {
    showCopyButtons();
    // The poller of a job that has ended asks no more: what came of the job is there now.
    if (event.target.id === "poller" && !event.target.hasAttribute("hx-get")) document.body.dispatchEvent(new CustomEvent("ended"));
    if (event.target.id === "plan") { markFields(event.target); return; }
    if (event.target.id === "log-more" || event.target.closest?.("pre.log")) { if (logAtEnd) scrollLog(); return; }
    fetchCurves();
  });
  showCopyButtons();
  scrollLog();
  fetchCurves();
})();
