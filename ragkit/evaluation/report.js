"use strict";
// Builds the list of questions and the view of one. Everything from the run is set as text.
(() => {
  const PAGE = 50;
  const [ID, QUESTION, GOLDS, SCORES, ANSWER, ABSTAINED, STAGE] = [0, 1, 2, 3, 4, 5, 6];
  const byId = (id) => document.getElementById(id);
  const { chunk: CHUNK, measures, rows } = JSON.parse(byId("index").textContent);
  const read = rows.some((row) => row[ANSWER] !== null);
  const staged = rows.some((row) => row[STAGE] !== null);
  const golden = rows.some((row) => row[GOLDS].length > 0);
  const state = { found: [], page: 0, scroll: 0, listed: false };
  let haystack = null;

  function el(tag, properties, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties || {})) {
      if (name === "class") element.className = value;
      else if (name === "click") element.addEventListener("click", value);
      else element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== ""));
    return element;
  }

  const value = (id) => (byId(id) ? byId(id).value : "");
  const show = (score) => (score === null || score === undefined ? "–" : score.toFixed(3));
  const heading = (row) => row[QUESTION] || row[ID];

  // --- the list

  function search(words) {
    if (!words.length) return rows.map((_, number) => number);
    haystack ||= rows.map((row) =>
      [row[ID], row[QUESTION], row[ANSWER] || "", ...row[GOLDS]].join("\n").toLowerCase());
    const numbers = [];
    haystack.forEach((text, number) => {
      if (words.every((word) => text.includes(word))) numbers.push(number);
    });
    return numbers;
  }

  function update() {
    const words = value("search").toLowerCase().split(/\s+/).filter(Boolean);
    const place = measures.indexOf(value("measure"));
    const [stage, abstained, order] = [value("stage"), value("abstained"), value("order")];
    const score = (number) => (place < 0 ? null : rows[number][SCORES][place]);
    const wanted = {
      "": () => true,
      right: (x) => x !== null && x >= 1,
      partly: (x) => x !== null && x > 0 && x < 1,
      wrong: (x) => x !== null && x <= 0,
      none: (x) => x === null,
    }[value("score")];
    state.found = search(words).filter((number) => {
      const row = rows[number];
      return (!stage || row[STAGE] === stage) && wanted(score(number))
        && (!abstained || Boolean(row[ABSTAINED]) === (abstained === "yes"));
    });
    if (order) {
      const sign = order === "best" ? -1 : 1;
      const key = (number) => (score(number) === null ? Infinity : sign * score(number));
      state.found.sort((a, b) => (key(a) === key(b) ? a - b : key(a) < key(b) ? -1 : 1));
    }
    state.page = 0;
    fill();
  }

  function fill() {
    const measure = value("measure");
    const place = measures.indexOf(measure);
    const columns = [
      ["question", "Question", null],
      read && ["answer", "Answer", (row) => row[ANSWER] || (row[ABSTAINED] ? "(abstained)" : "–")],
      golden && ["golds", "Gold", (row) => row[GOLDS].join(" · ") || "–"],
      staged && ["stage", "Stage", (row) => row[STAGE] || "–"],
      place >= 0 && ["score", measure, (row) => show(row[SCORES][place])],
    ].filter(Boolean);
    byId("list").tHead.rows[0].replaceChildren(...columns.map(([name, title]) =>
      el("th", { class: name, role: "columnheader", scope: "col" }, title)));
    const start = state.page * PAGE;
    const shown = state.found.slice(start, start + PAGE);
    byId("list").tBodies[0].replaceChildren(...shown.map((number) => {
      const row = rows[number];
      return el("tr", { role: "row" }, ...columns.map(([name, title, text]) => {
        const cell = el("td", { class: name, role: "cell", "data-name": title });
        if (text) cell.append(el("span", { class: "clamp" }, text(row)));
        else {
          const open = () => { state.listed = true; location.hash = `#question/${number}`; };
          cell.append(el("button", { type: "button", class: "link", id: `row-${number}`, click: open },
            el("span", { class: "clamp" }, heading(row))));
          if (row[QUESTION]) cell.append(el("span", { class: "id" }, row[ID]));
        }
        return cell;
      }));
    }));
    const many = state.found.length;
    const all = many === rows.length ? "" : ` (of ${rows.length.toLocaleString("en")})`;
    byId("found").textContent = many
      ? `${(start + 1).toLocaleString("en")}–${(start + shown.length).toLocaleString("en")} of ${many.toLocaleString("en")}${all}`
      : "No question fits the search and the filters.";
    const last = Math.max(0, Math.ceil(many / PAGE) - 1);
    byId("first").disabled = byId("previous").disabled = state.page === 0;
    byId("next").disabled = byId("last").disabled = state.page >= last;
  }

  function turn(page) {
    const last = Math.max(0, Math.ceil(state.found.length / PAGE) - 1);
    state.page = Math.min(Math.max(page, 0), last);
    fill();
    byId("questions").scrollIntoView();
  }

  // --- one question

  const parsed = new Promise((resolve) => {
    if (document.readyState !== "loading") resolve();
    else document.addEventListener("DOMContentLoaded", resolve);
  });
  const inflated = new Map(); // the chunks that were read last

  async function inflate(id) {
    await parsed;
    if (typeof DecompressionStream === "undefined") {
      throw new Error("this browser has no DecompressionStream; a newer one shows them");
    }
    const bytes = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  async function item(kind, number) {
    const id = `${kind}-${Math.floor(number / CHUNK)}`;
    if (!inflated.has(id)) inflated.set(id, inflate(id));
    if (inflated.size > 64) inflated.delete(inflated.keys().next().value);
    return (await inflated.get(id))[number % CHUNK];
  }

  async function detailsOf(number) {
    const detail = await item("details", number);
    const passages = new Map(await Promise.all(Object.entries(detail.places).map(
      async ([id, place]) => {
        const [title, text] = await item("passages", place);
        return [id, { title, text }];
      })));
    return { detail, passages };
  }

  function passage(rank, id, facts, marks, passages) {
    const found = passages.get(id);
    return el("li", {},
      el("div", { class: "head" }, el("span", { class: "rank" }, rank),
        el("span", { class: "title" }, (found && found.title) || id), ...marks),
      el("div", { class: "facts-line" }, facts),
      found ? el("p", { class: "text" }, found.text)
        : el("p", { class: "text muted" }, "The run folder does not hold its text."));
  }

  function passagesView(detail, passages) {
    const cited = new Set(detail.citations);
    const items = detail.hits.map(([rank, id, score, grade, parent]) => {
      const place = detail.shown.indexOf(id);
      const marks = [];
      if (grade > 0) marks.push(el("span", { class: "mark gold" }, grade > 1 ? `gold, grade ${grade}` : "gold"));
      if (place >= 0) marks.push(el("span", { class: "mark" }, `shown as [${place + 1}]`));
      if (cited.has(id)) {
        marks.push(el("span", { class: "mark" }, detail.attributed ? "holds the answer’s words" : "cited"));
      }
      const facts = [`id ${id}`, `score ${score}`];
      if (parent) facts.push(`part of ${parent}`);
      if (grade === 0) facts.push("judged not relevant");
      return passage(String(rank), id, facts.join(" · "), marks, passages);
    });
    const rest = detail.found - detail.hits.length;
    const more = rest > 0 ? el("p", { class: "muted" }, `${rest.toLocaleString("en")} more hits are not listed.`) : null;
    return [el("h2", {}, "Passages"),
      items.length ? el("ol", { class: "passages" }, ...items) : el("p", { class: "muted" }, "Nothing was found."), more];
  }

  function contextsView(detail, passages) {
    if (!detail.contexts.length) return [];
    const names = [...new Set(detail.contexts.flatMap(([, of]) => Object.keys(of.scores)))];
    const head = [["Context", ""], ["Answer", "words"], ...names.map((name) => [name, "score"]), ["Shown", "shown"]];
    const body = detail.contexts.map(([name, of]) => el("tr", {},
      el("th", { scope: "row" }, name),
      el("td", { class: "words" }, of.answer || (of.abstained ? "(abstained)" : "–")),
      ...names.map((measure) => el("td", { class: "score" }, show(of.scores[measure]))),
      el("td", { class: "shown" }, of.shown.map((id, place) => `[${place + 1}] ${id}`).join("  ") || "nothing")));
    const listed = new Set(detail.hits.map((hit) => hit[1]));
    const gold = new Set(detail.contexts.flatMap(([name, of]) => (name === "gold" ? of.shown : [])));
    const others = [...new Set(detail.contexts.flatMap(([, of]) => of.shown))].filter((id) => !listed.has(id));
    const items = others.map((id) => passage("–", id, `id ${id}`,
      gold.has(id) ? [el("span", { class: "mark gold" }, "gold")] : [], passages));
    return [el("h2", {}, "Answers in other contexts"),
      el("div", { class: "scroll" }, el("table", { class: "contexts" },
        el("thead", {}, el("tr", {}, ...head.map(([title, kind]) => el("th", { class: kind, scope: "col" }, title)))),
        el("tbody", {}, ...body))),
      items.length ? el("details", {}, el("summary", {}, `Passages shown there and not listed above (${items.length})`),
        el("ol", { class: "passages" }, ...items)) : null];
  }

  function judgeView(detail) {
    const verdict = { true: "yes", false: "no", null: "no verdict" };
    const lines = Object.entries(detail.judge).map(([name, of]) => el("div", {},
      el("dt", {}, `${name}: ${verdict[of.verdict]}`), el("dd", {}, of.reply)));
    return lines.length ? [el("h2", {}, "What the judge replied"), el("dl", { class: "judged" }, ...lines)] : [];
  }

  function summary(row) {
    const said = [];
    const add = (name, ...children) => said.push(el("dt", {}, name), el("dd", {}, ...children));
    if (row[ANSWER] !== null) add("Answer", row[ANSWER] || el("span", { class: "muted" }, "(empty)"));
    if (row[ABSTAINED]) add("Abstained", "yes");
    if (row[GOLDS].length) {
      add(row[GOLDS].length > 1 ? "Gold answers" : "Gold answer",
        el("ul", {}, ...row[GOLDS].map((gold) => el("li", {}, gold))));
    }
    if (row[STAGE] !== null) {
      add("Stage", el("span", { class: row[STAGE] === "correct" ? "mark gold" : "mark lost" }, row[STAGE]));
    }
    add("Id", row[ID]);
    const scored = measures.map((name, place) => [name, row[SCORES][place]]).filter(([, x]) => x !== null);
    const scores = scored.map(([name, x]) => el("div", {}, el("dt", {}, name), el("dd", {}, show(x))));
    return [el("dl", { class: "said" }, ...said),
      ...(scores.length ? [el("h2", {}, "Scores"), el("dl", { class: "scores" }, ...scores)] : [])];
  }

  function bar(number) {
    const place = state.found.indexOf(number);
    const step = (by) => {
      const next = place < 0 ? undefined : state.found[place + by];
      const go = () => location.replace(`#question/${next}`);
      const button = el("button", { type: "button", click: go }, by < 0 ? "Previous" : "Next");
      button.disabled = next === undefined;
      return button;
    };
    const back = () => (state.listed ? history.back() : location.replace("#questions"));
    const where = place < 0 ? "" : `${(place + 1).toLocaleString("en")} of ${state.found.length.toLocaleString("en")}`;
    return el("div", { class: "bar" }, el("button", { type: "button", id: "back", click: back }, "Back to the report"),
      step(-1), step(1), el("span", { class: "muted" }, where));
  }

  async function open(number) {
    if (!byId("report").hidden) state.scroll = scrollY;
    const row = rows[number];
    const title = el("h1", { tabindex: "-1" }, heading(row));
    const body = el("div", { "aria-busy": "true" }, el("p", { class: "muted" }, "Reading the details …"));
    byId("question").replaceChildren(bar(number), title, ...summary(row), body);
    byId("report").hidden = true;
    byId("question").hidden = false;
    scrollTo(0, 0);
    title.focus({ preventScroll: true });
    let parts;
    try {
      const { detail, passages } = await detailsOf(number);
      parts = [...passagesView(detail, passages), ...contextsView(detail, passages), ...judgeView(detail)];
      if (detail.prompt !== null) {
        const prompt = detail.prompt.map((part, place) => (place % 2 ? passages.get(part).text : part));
        parts.push(el("details", { id: "prompt" }, el("summary", {}, "Prompt"), el("pre", {}, prompt.join(""))));
      }
    } catch (error) {
      parts = [el("p", { role: "alert" }, `The details cannot be read: ${error.message}.`)];
    }
    body.replaceChildren(...parts.filter(Boolean));
    body.removeAttribute("aria-busy");
  }

  function close() {
    if (!byId("report").hidden) return;
    const last = byId("question").dataset.number;
    byId("question").hidden = true;
    byId("question").replaceChildren();
    byId("report").hidden = false;
    const button = byId(`row-${last}`);
    if (location.hash === "#questions") byId("questions").scrollIntoView();
    else scrollTo(0, state.scroll);
    if (button) button.focus({ preventScroll: true });
    state.listed = false;
  }

  function route() {
    const match = /^#question\/(\d+)$/.exec(location.hash);
    const number = match ? Number(match[1]) : -1;
    if (number >= 0 && number < rows.length) {
      byId("question").dataset.number = String(number);
      open(number);
    } else close();
  }

  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("search").addEventListener("input", update);
  for (const select of byId("filters").querySelectorAll("select")) select.addEventListener("change", update);
  byId("first").addEventListener("click", () => turn(0));
  byId("previous").addEventListener("click", () => turn(state.page - 1));
  byId("next").addEventListener("click", () => turn(state.page + 1));
  byId("last").addEventListener("click", () => turn(Infinity));
  for (const button of document.querySelectorAll("[data-stage]")) {
    button.addEventListener("click", () => {
      byId("stage").value = button.dataset.stage;
      update();
      byId("questions").scrollIntoView();
    });
  }
  addEventListener("hashchange", route);
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !byId("question").hidden) byId("back").click();
  });
  update();
  route();
})();
