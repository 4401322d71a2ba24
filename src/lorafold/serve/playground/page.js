"use strict";
// Whatever comes from the server is put into the page as text (textContent, value), never as HTML.
(() => {
  const root = document.documentElement;
  const id = (name) => document.getElementById(name);
  const settings = id("settings");
  const MOST = 8;  // settings, side by side
  const EXAMPLES = [
    "widget -> ", "1994 -> ", "def read(path):\n    \"\"\"", "Traceback (most recent call last):\n",
    "INSERT INTO ", "Once upon a time", "Dear all,\n",
  ];
  let base = null;
  let adapters = [];
  let count = 0;
  const running = new Map();  // a setting -> what ends it

  // The theme

  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  function paint() {
    const theme = chosen ?? (system.matches ? "dark" : "light");
    root.dataset.theme = theme;
    id("theme").textContent = theme === "dark" ? "Light" : "Dark";
  }
  id("theme").addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    paint();
  });
  system.addEventListener("change", paint);
  paint();

  // The server

  function headers() {
    const key = id("key").value;
    return {
      "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}),
    };
  }

  async function problem(response) {
    let said = "";
    try { said = (await response.json()).error.message; } catch { /* no body of the API's */ }
    if (response.status === 401) id("key-field").hidden = false;
    return new Error(said || `the server answered with status ${response.status}`);
  }

  async function look() {
    try {
      const response = await fetch("v1/models", { headers: headers() });
      if (!response.ok) throw await problem(response);
      const models = (await response.json()).data;
      const first = models.find((m) => !m.parent);
      base = first ? first.id : null;
      adapters = models.filter((m) => m !== first).map((m) => m.id);
      const many = adapters.length === 1 ? "1 adapter" : `${adapters.length} adapters`;
      id("served").textContent = `${base} with ${many}`;
      for (const select of settings.querySelectorAll("select.name")) offer(select);
      if (!settings.children.length) {
        add({ parts: [] });
        if (adapters.length) add({ parts: [[adapters[0], 1]] });
      }
    } catch (e) {
      id("served").textContent = `What it serves is not known: ${e.message}`;
    }
    busy();
  }
  id("key").addEventListener("change", look);

  // A stream of events: the data of each, however the bytes are cut

  async function* events(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      rest += value ?? "";
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = done ? "" : lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
      if (done) return;
    }
  }

  // Settings

  function offer(select) {
    const before = select.value;
    const none = new Option("none: the base", "");
    select.replaceChildren(none, ...adapters.map((name, i) => new Option(name, String(i + 1))));
    select.value = before;
    if (select.selectedIndex < 0) select.selectedIndex = 0;
  }

  const nameOf = (select) => (select.selectedIndex > 0 ? adapters[select.selectedIndex - 1] : null);

  function addPart(setting, name = null, weight = 1) {
    const part = id("part").content.cloneNode(true).querySelector(".part");
    const select = part.querySelector(".name");
    offer(select);
    select.selectedIndex = name === null ? 0 : adapters.indexOf(name) + 1;
    part.querySelector(".weight").value = weight;
    part.querySelector(".less").addEventListener("click", () => {
      const other = part.nextElementSibling ?? part.previousElementSibling;
      part.remove();
      label(setting);
      changed(setting);
      (other?.querySelector(".name") ?? setting.querySelector(".more")).focus();
    });
    setting.querySelector(".parts").append(part);
    label(setting);
    return select;
  }

  // Names of what can be reached, for those who hear the page
  function label(setting) {
    const n = setting.dataset.number;
    const title = `Setting ${n}`;
    setting.setAttribute("aria-label", title);
    setting.querySelector("h2").textContent = title;
    setting.querySelector(".copy").setAttribute("aria-label", `Copy setting ${n}`);
    setting.querySelector(".remove").setAttribute("aria-label", `Remove setting ${n}`);
    setting.querySelector(".more").setAttribute("aria-label", `Add an adapter to setting ${n}`);
    setting.querySelector(".one").setAttribute("aria-label", `Run setting ${n}`);
    setting.querySelector(".answer").setAttribute("aria-label", `Answer ${n}`);
    for (const [name, of] of [["c", ".c"], ["rank", ".rank"]]) {
      setting.querySelector(of).id = `${name}-${n}`;
      setting.querySelector(`.for-${name}`).htmlFor = `${name}-${n}`;
    }
    setting.querySelector(".c-number").setAttribute("aria-label", `Strength c of setting ${n}, as a number`);
    [...setting.querySelectorAll(".part")].forEach((part, i) => {
      const which = `${i + 1} of setting ${n}`;
      part.querySelector(".name").setAttribute("aria-label", `Adapter ${which}`);
      part.querySelector(".weight").setAttribute("aria-label", `Weight of adapter ${which}`);
      part.querySelector(".less").setAttribute("aria-label", `Take out adapter ${which}`);
    });
  }

  function add({ parts, c = 1, rank = "" }) {
    const setting = id("setting").content.cloneNode(true).querySelector(".setting");
    const one = (of) => setting.querySelector(of);
    setting.dataset.number = ++count;
    for (const [name, weight] of parts.length ? parts : [[null, 1]]) addPart(setting, name, weight);
    one(".c").value = one(".c-number").value = c;
    one(".rank").value = rank;
    one(".c").addEventListener("input", () => { one(".c-number").value = one(".c").value; });
    one(".c-number").addEventListener("input", () => { one(".c").value = one(".c-number").value; });
    one(".more").addEventListener("click", () => addPart(setting).focus());
    one(".one").addEventListener("click", () => run([setting]));
    one(".copy").addEventListener("click", () => add(read(setting))?.querySelector(".name").focus());
    one(".remove").addEventListener("click", () => {
      running.get(setting)?.abort();
      const other = setting.nextElementSibling ?? setting.previousElementSibling;
      setting.remove();
      limit();
      (other?.querySelector(".remove") ?? id("add")).focus();
    });
    setting.addEventListener("change", () => changed(setting));
    label(setting);
    settings.append(setting);
    limit();
    return setting;
  }

  function limit() {
    const full = settings.children.length >= MOST;
    for (const button of [id("add"), ...settings.querySelectorAll(".copy")]) button.disabled = full;
  }

  function read(setting) {
    const parts = [...setting.querySelectorAll(".part")].map((part) => [
      nameOf(part.querySelector(".name")), part.querySelector(".weight").value,
    ]);
    return {
      parts: parts.filter(([name]) => name !== null),
      c: setting.querySelector(".c-number").value,
      rank: setting.querySelector(".rank").value,
    };
  }

  function changed(setting) {
    if (id("live").checked) run([setting]);
  }

  // What a setting asks for, and how that is said

  const chat = () => id("kind").value === "chat";

  function asked(setting) {
    const { parts, c, rank } = read(setting);
    const prompt = id("prompt").value;
    const what = chat() ? { messages: [{ role: "user", content: prompt }] } : { prompt };
    const body = {
      model: base, ...what, max_tokens: Number(id("tokens").value),
      temperature: Number(id("temperature").value), stream: true,
      stream_options: { include_usage: true },
    };
    if (id("seed").value !== "") body.seed = Number(id("seed").value);
    if (parts.length) {
      body.c = Number(c);
      if (rank !== "") body.rank = Number(rank);
      const mix = parts.map(([name, weight]) => ({ name, scale: Number(weight) }));
      if (mix.length === 1 && mix[0].scale === 1) body.model = mix[0].name;  // "auto" is one, too
      else body.lora = mix;
    }
    return body;
  }

  const shown = (number) => String(number).replace("-", "−");

  function said(body) {
    if (body.c === undefined) return `${base}, no adapter`;
    const mix = (body.lora ?? [{ name: body.model, scale: 1 }]).map(({ name, scale }) => (scale === 1 ? name : `${shown(scale)} × ${name}`));
    const rank = body.rank === undefined ? "all ranks" : `rank ${body.rank}`;
    return `${mix.join(" + ")}, c = ${shown(body.c)}, ${rank}, on ${base}`;
  }

  async function answer(setting) {
    running.get(setting)?.abort();
    const control = new AbortController();
    running.set(setting, control);
    const one = (of) => setting.querySelector(of);
    const body = asked(setting);
    setting.classList.add("running");
    one(".answer").setAttribute("aria-busy", "true");
    one(".asked").textContent = body.prompt ?? "";
    one(".problem").hidden = true;
    const text = document.createTextNode("");
    one(".text").replaceChildren(text);
    one(".ran").textContent = said(body);
    one(".speed").textContent = "…";
    const start = performance.now();
    const seen = { first: null, last: null, pieces: 0, usage: null, reason: null };
    const current = () => running.get(setting) === control;
    try {
      const response = await fetch(body.messages ? "v1/chat/completions" : "v1/completions", {
        method: "POST", headers: headers(), body: JSON.stringify(body), signal: control.signal,
      });
      if (!response.ok) throw await problem(response);
      for await (const data of events(response.body)) {
        if (!current()) return false;
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        take(chunk, seen, text, one);
        // Where the server chose, it says whom.
        const chose = !body.lora && chunk.model && chunk.model !== body.model;
        one(".ran").textContent = said(body) + (chose ? `, answered by ${chunk.model}` : "");
        one(".speed").textContent = speed(seen, start);
      }
      one(".speed").textContent = speed(seen, start);
      return true;
    } catch (e) {
      if (!current()) return false;
      if (control.signal.aborted) {
        one(".speed").textContent = `${speed(seen, start)}, stopped`;
        return false;
      }
      one(".problem").textContent = e.message;
      one(".problem").hidden = false;
      one(".speed").textContent = speed(seen, start);
      return false;
    } finally {
      if (current()) {
        running.delete(setting);
        setting.classList.remove("running");
        one(".answer").setAttribute("aria-busy", "false");
      }
    }
  }

  function take(chunk, seen, text, one) {
    if (chunk.usage) seen.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    seen.reason = choice.finish_reason ?? seen.reason;
    const piece = choice.text ?? choice.delta?.content;
    if (piece === undefined || piece === null) return;
    seen.last = performance.now();
    seen.first ??= seen.last;
    seen.pieces += 1;
    text.appendData(piece);
    const box = one(".answer");
    if (box.scrollHeight - box.scrollTop - box.clientHeight < 60) box.scrollTop = box.scrollHeight;
  }

  function speed(seen, start) {
    if (seen.first === null) return "no tokens";
    const tokens = seen.usage?.completion_tokens ?? seen.pieces;
    const seconds = (seen.last - seen.first) / 1000;
    // The first comes after the prompt was read, so it has a time of its own.
    const rate = tokens > 1 && seconds > 0 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s, ` : "";
    const why = seen.reason ? `, ended by ${seen.reason}` : "";
    const first = ((seen.first - start) / 1000).toFixed(2);
    return `${rate}${tokens} ${tokens === 1 ? "token" : "tokens"}, first after ${first} s${why}`;
  }

  function busy() {
    id("stop").disabled = !running.size;
    id("run").disabled = base === null;
  }

  async function run(some) {
    if (base === null || !id("ask").reportValidity()) return;
    const fine = some.every((s) => [...s.querySelectorAll("input")].every((i) => i.reportValidity()));
    if (!fine || !some.length) return;
    id("status").textContent = some.length === 1 ? "Running …" : `Running ${some.length} settings …`;
    const answers = some.map(answer);
    busy();
    const done = await Promise.all(answers);
    busy();
    if (running.size) return;
    const well = done.filter(Boolean).length;
    id("status").textContent = well === done.length
      ? (well === 1 ? "1 answer is there." : `${well} answers are there.`)
      : `${well} of ${done.length} answers are there.`;
  }

  id("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    run([...settings.children]);
  });
  id("stop").addEventListener("click", () => { for (const c of running.values()) c.abort(); });
  id("add").addEventListener("click", () => {
    const last = settings.lastElementChild;
    add(last ? read(last) : { parts: [] }).querySelector(".name").focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      run([...settings.children]);
    }
  });
  id("example").replaceChildren(
    ...EXAMPLES.map((text, i) => new Option(JSON.stringify(text).slice(1, -1), String(i))),
  );
  id("example").addEventListener("change", () => {
    id("prompt").value = EXAMPLES[id("example").selectedIndex];
  });
  id("prompt").value = EXAMPLES[0];
  look();
})();
