/* The page as a tool: boxes that open, moving and enlarging, search and filters, ways between issue and box.
   Without it the page is a plain report. What is selected stands in the address, so the browser's way back works. */
(function () {
  "use strict";
  const all = (what, where) => Array.from((where || document).querySelectorAll(what));
  const one = (what) => document.querySelector(what);
  document.documentElement.classList.add("js");

  /* ---- the picture: the same numbers as in drawing.py */
  const W = 300, H = 42, GAP = 18, ROW = 20, LEFT = 8, TOP = 10, LANE = 11;
  const svg = one("svg.blocks"), boxes = all(".box"), edges = all(".edge"), stage = one(".stage");
  const ids = (box) => box.dataset.issues.split(" ").filter(Boolean);
  const tops = [];
  let total = 0, view = null, drag = null;

  function way(start, end, lane) {
    if (!lane) return `M${LEFT + W / 2} ${start}V${end}`;
    const side = LEFT + W, x = side + 10 + LANE * lane, a = start - 8, b = end + 8;
    return `M${side} ${a}C${x} ${a} ${x} ${a} ${x} ${(a + b) / 2}S${x} ${b} ${side} ${b}`;
  }

  function layout() {
    let y = TOP;
    boxes.forEach((box, i) => {
      const open = box.classList.contains("open");
      const height = H + (open ? ROW * Number(box.dataset.rows) + 6 : 0);
      tops[i] = [y, y + height];
      box.setAttribute("transform", `translate(${LEFT} ${y})`);
      box.querySelector(".frame").setAttribute("height", height);
      y += height + GAP;
    });
    edges.forEach((edge) => {
      const u = tops[edge.dataset.u], v = tops[edge.dataset.v];
      edge.setAttribute("d", way(u[1], v[0], Number(edge.dataset.lane)));
    });
    total = y;
  }

  function toggle(box, open) {
    if (!box.hasAttribute("aria-expanded")) return;
    box.setAttribute("aria-expanded", String(box.classList.toggle("open", open)));
    stage.style.maxHeight = "";
    layout();
  }

  /* ---- moving and enlarging: `view` is what the stage shows, in the picture's units */
  const natural = svg ? Number(svg.getAttribute("width")) : 0;
  const ratio = () => stage.clientHeight / Math.max(stage.clientWidth, 1);
  function show() {
    view.w = Math.min(Math.max(view.w, 120), Math.max(4 * natural, total / ratio()));
    view.y = Math.min(Math.max(view.y, 0), Math.max(total - view.w * ratio(), 0));
    view.x = Math.min(Math.max(view.x, -view.w / 2), natural - view.w / 2);
    svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.w} ${view.w * ratio()}`);
  }
  function fit() {
    const w = Math.max(natural, stage.clientWidth);
    view = { x: (natural - w) / 2, y: 0, w };
    stage.style.maxHeight = `${(total * stage.clientWidth) / w}px`;
    show();
  }
  function zoom(by, x, y) {
    const fx = x === undefined ? 0.5 : x, fy = y === undefined ? 0.5 : y, before = view.w;
    view.w *= by;
    view.w = Math.min(Math.max(view.w, 120), Math.max(4 * natural, total / ratio()));
    view.x += (before - view.w) * fx;
    view.y += (before - view.w) * ratio() * fy;
    show();
  }
  function centre(box) {
    const [top, bottom] = tops[boxes.indexOf(box)], height = view.w * ratio();
    if (top < view.y || bottom > view.y + height) view.y = top - height / 3;
    show();
  }

  /* ---- what is selected */
  const trail = [];
  function clear() { all(".hit").forEach((e) => e.classList.remove("hit")); }
  function select() {
    const found = location.hash.length > 1 ? document.getElementById(location.hash.slice(1)) : null;
    clear();
    if (found && found.classList.contains("box")) {
      found.classList.add("hit");
      centre(found);
      const cards = ids(found).map((i) => document.getElementById(`issue-${i}`)).filter((c) => c && !c.hidden);
      cards.forEach((card) => card.classList.add("hit"));
      if (cards.length && cards[0].closest("details.rest")) cards[0].closest("details.rest").open = true;
      if (cards.length) cards[0].scrollIntoView({ block: "center" });
    } else if (found && found.classList.contains("issue")) {
      found.classList.add("hit");
      if (found.closest("details.rest")) found.closest("details.rest").open = true;
      const box = boxes[found.dataset.box];
      if (!box) { found.scrollIntoView({ block: "center" }); return; }
      toggle(box, true);
      box.classList.add("hit");
      all(".row", box).forEach((row) => row.classList.toggle("hit", row.querySelector(".name").textContent === found.dataset.name));
      centre(box);
      if (innerWidth < 1000) stage.scrollIntoView({ block: "center" });
      else found.scrollIntoView({ block: "nearest" });
    }
  }
  function go(hash) {
    if (location.hash === hash) { select(); return; }
    trail.push(hash);
    one("#back").disabled = false;
    location.hash = hash;
  }
  one("#back").addEventListener("click", () => { trail.pop(); one("#back").disabled = !trail.length; history.back(); });
  addEventListener("hashchange", select);

  /* ---- search and filters */
  const search = one("#search"), choice = (id) => (one(`#${id}`) || { value: "" }).value;
  function filter() {
    const words = search.value.toLowerCase().trim(), kind = choice("kind"), severity = choice("severity");
    const filtered = Boolean(kind || severity), shown = new Set();
    const has = (text) => !words || text.toLowerCase().includes(words);
    all(".issue").forEach((card) => {
      const fits = (!kind || card.dataset.kind === kind) && (!severity || card.dataset.severity === severity);
      card.hidden = !(fits && has(card.textContent));
      if (fits) shown.add(card.id.slice(6));
    });
    const hits = boxes.filter((box) => {
      const named = has(`${box.dataset.name} ${box.dataset.type}`);
      const hit = named && (!filtered || ids(box).some((i) => shown.has(i)));
      box.classList.toggle("dim", !hit);
      return hit;
    });
    all("#layers tbody tr").forEach((row) => { row.hidden = !has(row.textContent); });
    const active = Boolean(words || filtered);
    one("#count").textContent = active ? `${hits.length} of ${boxes.length} boxes` : "";
    if (active && hits.length && view) centre(hits[0]);
    return hits;
  }
  [search, one("#kind"), one("#severity")].forEach((e) => e && e.addEventListener("input", filter));
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter") { const hits = filter(); if (hits.length) go(`#${hits[0].id}`); }
    if (event.key === "Escape") { search.value = ""; filter(); search.blur(); }
  });
  addEventListener("keydown", (event) => {
    if (event.key === "/" && !/INPUT|SELECT/.test(document.activeElement.tagName)) { event.preventDefault(); search.focus(); }
  });
  all(".issue .show").forEach((link) => link.addEventListener("click", (event) => {
    event.preventDefault();
    go(`#${link.closest(".issue").id}`);
  }));

  /* ---- tables that sort by the head that is clicked */
  all(".sortable th").forEach((head) => {
    const column = Array.from(head.parentNode.children).indexOf(head), body = head.closest("table").tBodies[0];
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      all("th", head.parentNode).forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => { const cell = row.children[column], v = cell.dataset.v; return v === undefined ? cell.textContent : v === "" ? -Infinity : Number(v); };
      const rows = Array.from(body.rows).map((row) => [key(row), row]);
      rows.sort((a, b) => (typeof a[0] === "number" ? (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0) : String(a[0]).localeCompare(String(b[0]), undefined, { numeric: true })));
      body.append(...(down ? rows.reverse() : rows).map((pair) => pair[1]));
    };
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); } });
  });

  /* ---- heat maps tell what the pointer is over */
  all(".maps figure").forEach((figure) => {
    const img = figure.querySelector("img"), tip = figure.querySelector(".tip"), names = tip.dataset.names.split("\n");
    img.addEventListener("pointermove", (event) => {
      const at = img.getBoundingClientRect(), part = (v, n) => Math.min(Math.max(Math.floor(v * n), 0), n - 1);
      const step = part((event.clientY - at.top) / at.height, Number(tip.dataset.steps));
      tip.textContent = `${names[part((event.clientX - at.left) / at.width, names.length)]}, step ${step}`;
    });
  });
  addEventListener("beforeprint", () => { all("details").forEach((d) => { d.open = true; }); if (svg) svg.setAttribute("viewBox", `0 0 ${natural} ${total}`); });
  addEventListener("afterprint", () => { if (svg) show(); });
  if (!svg) return;

  boxes.forEach((box) => {
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(box); go(`#${box.id}`); }
    });
    box.addEventListener("focus", () => { if (box.matches(":focus-visible")) centre(box); });
  });
  stage.addEventListener("pointerdown", (event) => { drag = { x: event.clientX, y: event.clientY, far: 0, box: event.target.closest(".box") }; stage.setPointerCapture(event.pointerId); });
  stage.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const unit = view.w / stage.clientWidth, dx = event.clientX - drag.x, dy = event.clientY - drag.y;
    drag.far += Math.abs(dx) + Math.abs(dy);
    if (drag.far < 5) return;
    view.x -= dx * unit; view.y -= dy * unit; drag.x = event.clientX; drag.y = event.clientY;
    show();
  });
  stage.addEventListener("pointerup", () => {
    const box = drag && drag.far < 5 ? drag.box : null;
    drag = null;
    if (box) { toggle(box); go(`#${box.id}`); }
  });
  stage.addEventListener("wheel", (event) => {
    const at = stage.getBoundingClientRect(), before = view.y;
    if (event.ctrlKey) zoom(event.deltaY > 0 ? 1.15 : 0.87, (event.clientX - at.left) / at.width, (event.clientY - at.top) / at.height);
    else { view.y = Math.min(Math.max(before + event.deltaY * view.w / stage.clientWidth, 0), Math.max(total - view.w * ratio(), 0)); show(); }
    if (event.ctrlKey || view.y !== before) event.preventDefault();
  }, { passive: false });
  const actions = { in: () => zoom(0.8), out: () => zoom(1.25), fit, open: () => { const open = !boxes.some((b) => b.classList.contains("open")); boxes.forEach((b) => toggle(b, open)); show(); } };
  all(".buttons button").forEach((button) => button.addEventListener("click", actions[button.dataset.do]));
  addEventListener("resize", () => show());
  layout();
  fit();
  const first = one(".issue[data-box]");
  if (first && boxes[first.dataset.box]) centre(boxes[first.dataset.box]);
  select();
})();
