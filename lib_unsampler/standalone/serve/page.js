/*
 * The page of `python -m lib_unsampler serve`: its picture, its Generate and its gallery. The form, the curve and the
 * player are javascript/batch_unsampler.js, which hears of a result by `batch-unsampler-result`.
 */
(() => {
    "use strict";

    const at = (id) => document.getElementById(id);
    let run = null;

    const dark = matchMedia("(prefers-color-scheme: dark)");
    const follow = () => document.documentElement.classList.toggle("dark", dark.matches);
    dark.addEventListener("change", follow);
    follow();

    // ---- The picture --------------------------------------------------------------------------------

    /** The chosen picture's size as it will be made: shrunk to the longest side, never enlarged. */
    function measure() {
        const shown = at("shown");
        const [width, height] = [shown.naturalWidth, shown.naturalHeight];
        const size = Number(at("own_size").value);
        const scale = Math.min(1, size / Math.max(width, height, 1));
        at("own_width").value = width ? Math.max(1, Math.round(width * scale)) : size;
        at("own_height").value = height ? Math.max(1, Math.round(height * scale)) : size;
        document.dispatchEvent(new CustomEvent("batch-unsampler-changed"));
    }

    function choose() {
        const [file] = at("own_picture").files;
        const example = document.querySelector("input[name=picture]:checked");
        if (at("shown").src.startsWith("blob:")) URL.revokeObjectURL(at("shown").src);
        at("shown").src = file ? URL.createObjectURL(file) : `/examples/${example.value}`;
    }

    /** A file as base64. */
    function encoded(file) {
        return new Promise((resolve, reject) => {
            const reader = new FileReader();
            reader.onload = () => resolve(reader.result.split(",")[1] || "");
            reader.onerror = () => reject(reader.error);
            reader.readAsDataURL(file);
        });
    }

    async function picture() {
        const [file] = at("own_picture").files;
        const most = Number(at("own_picture").dataset.most);
        if (file?.size > most) throw new Error(`${file.name} is larger than ${Math.round(most / 2 ** 20)} MB`);
        if (file) return { data: await encoded(file) };
        return { example: document.querySelector("input[name=picture]:checked").value };
    }

    // ---- A run --------------------------------------------------------------------------------------

    /** The form's fields by name: several as a list, a tick as true or false, the others as they are written. */
    function values() {
        const told = {};
        for (const input of at("batch_unsampler").querySelectorAll("input[name]")) {
            const several = input.type === "checkbox" && input.hasAttribute("value");
            if (several) told[input.name] = [...(told[input.name] || []), ...(input.checked ? [input.value] : [])];
            else if (input.type === "checkbox") told[input.name] = input.checked;
            else if (input.type !== "radio" || input.checked) told[input.name] = input.value;
        }
        return told;
    }

    function own() {
        const controls = [...document.querySelectorAll("[id^=own_]:not([type=file])")];
        return Object.fromEntries(controls.map((control) => [control.id.slice(4), control.value]));
    }

    function post(address, body) {
        const headers = { "Content-Type": "application/json" };
        return fetch(address, { method: "POST", headers, body: JSON.stringify(body) });
    }

    async function* lines(reply) {
        const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
        let rest = "";
        for (;;) {
            const { done, value } = await reader.read();
            if (done) return;
            const parts = (rest + value).split("\n");
            rest = parts.pop();
            for (const part of parts) yield JSON.parse(part);
        }
    }

    async function generate() {
        busy(true);
        say("");
        let ended = false;
        try {
            const reply = await post("/run", { values: values(), host: own(), picture: await picture() });
            if (!reply.ok) throw new Error((await reply.json()).error);
            for await (const line of lines(reply)) {
                hear(line);
                ended = ended || Boolean(line.result || line.errors || line.interrupted);
            }
            if (!ended) say("The server has ended this run.");
        } catch (error) {
            say(`It cannot be made: ${error.message}`);
        }
        busy(false);
    }

    function hear(line) {
        if (line.run) {
            run = line.run;
            say(line.waiting ? `Waiting: ${line.waiting} before this one` : "Begun");
        }
        if (line.progress) advance(line.progress);
        if (line.errors) say(line.errors.map(({ field, text }) => (field ? `${field}: ${text}` : text)).join("; "));
        if (line.interrupted) say("Interrupted; nothing of this run was kept.");
        if (line.result) show(line);
    }

    function advance({ part, done, of, unit }) {
        if (of) at("progress").setAttribute("max", of);
        if (of) at("progress").value = done;
        else at("progress").removeAttribute("value");
        say(`${part}: ${done}${of ? ` of ${of}` : ""} ${unit}s`);
    }

    function busy(on) {
        at("generate").disabled = on;
        at("interrupt").disabled = !on;
        at("progress").hidden = !on;
        at("progress").removeAttribute("value");
        if (!on) run = null;
    }

    function say(text) {
        at("says").textContent = text;
    }

    // ---- The gallery --------------------------------------------------------------------------------

    function caption(note) {
        if (!note) return "the picture";
        const level = note.step === null || note.step === undefined ? "" : ` at step ${note.step}`;
        return `${note.part || note.kind}${level}`;
    }

    function pictured(address, text) {
        const shown = document.createElement(address.endsWith(".mp4") ? "video" : "img");
        shown.src = address;
        if (shown.tagName === "VIDEO") {
            shown.loop = shown.muted = shown.autoplay = true;
            shown.setAttribute("aria-label", text);
        } else shown.alt = text;
        return shown;
    }

    function show({ result, images, said }) {
        const notes = result.extra_generation_params["Unsampler images"];
        const addresses = images.map((name) => `/results/${name.split("/").map(encodeURIComponent).join("/")}`);
        const shown = addresses.map((address, index) => {
            const link = document.createElement("a");
            link.href = address;
            link.title = caption(notes[index]);
            link.append(pictured(address, link.title));
            return link;
        });
        at("gallery").replaceChildren(...shown);
        for (const name of result.extra_generation_params["Unsampler latents names"]) {
            const option = document.createElement("option");
            option.value = name;
            at("batch_unsampler_files").prepend(option);
        }
        say(["Done", ...said].join("; "));
        document.dispatchEvent(new CustomEvent("batch-unsampler-result", { detail: { result, images: addresses } }));
    }

    at("shown").addEventListener("load", measure);
    at("shown").addEventListener("error", measure);
    at("own_size").addEventListener("input", measure);
    at("own_picture").addEventListener("change", choose);
    for (const example of document.querySelectorAll("input[name=picture]")) {
        example.addEventListener("change", () => {
            at("own_picture").value = "";
            choose();
        });
    }
    at("request").addEventListener("submit", (event) => {
        event.preventDefault();
        generate();
    });
    at("interrupt").addEventListener("click", () => run && post("/interrupt", { run }));
    if (at("shown").complete) measure();
})();
