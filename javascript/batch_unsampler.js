/*
 * The page of Batch Unsampler: the live schedule, the form's manners, the player.
 *
 * It knows no field and no host by itself. An element `.batch-unsampler-stage` holds the form as JSON
 * (lib_unsampler/settings/form.py), with selectors of the host's own controls. Each field is an element
 * `#batch_unsampler_NAME` with ordinary inputs in it. Questions go through hidden components of the page
 * (`#batch_unsampler_question`, `_answer`), or as POSTed JSON to an address that the form names (`url`). A page
 * of another host dispatches `batch-unsampler-result` on the document, with `{ result, images }` as its detail,
 * when a run is done; `places.latents` is then where latents files are served.
 *
 * Nothing is left in the global scope, nothing polls: it listens to the document's events and to a few
 * elements' changes. Without it every control works as it is.
 */
(() => {
    "use strict";

    const PREFIX = "batch_unsampler";
    const CSS = "batch-unsampler";
    const SVG = "http://www.w3.org/2000/svg";
    const ASK_AFTER = 200;
    const ANSWER_WITHIN = 20000;
    const OWN = ["own", "mask", "grid"]; // what of a result is the WebUI's, where its own pictures come first

    /** An element with attributes (or `on` handlers) and children. */
    function make(tag, attributes = {}, ...children) {
        const element = document.createElement(tag);
        for (const [name, value] of Object.entries(attributes)) {
            if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
            else if (value !== null && value !== undefined && value !== false) {
                element.setAttribute(name, value === true ? "" : value);
            }
        }
        element.append(...children.filter((child) => child !== null));
        return element;
    }

    function draw(tag, attributes, text = null) {
        const element = document.createElementNS(SVG, tag);
        for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
        if (text !== null) element.textContent = text;
        return element;
    }

    function button(text, title, act, attributes = {}) {
        return make("button", { type: "button", class: `${CSS}-button`, title, onclick: act, ...attributes }, text);
    }

    /** Puts a value into an input as a user would, so that the host's framework takes it. */
    function type(input, value) {
        input.value = value;
        input.dispatchEvent(new Event("input", { bubbles: true }));
        input.dispatchEvent(new Event("change", { bubbles: true }));
    }

    function short(number, digits = 4) {
        return Number(Number(number).toPrecision(digits)).toString();
    }

    // ---- One field of the form ----------------------------------------------------------------------

    class Field {
        constructor(told, page) {
            Object.assign(this, told);
            this.page = page;
            this.box = document.getElementById(`${PREFIX}_${told.name}`);
            this.box.classList.add(`${CSS}-field`, `${CSS}-${told.kind}`);
            this.hideNativeHelp();
            this.addHelp();
            this.error = make("div", { class: `${CSS}-error`, id: `${this.box.id}_error`, hidden: true });
            this.box.append(this.error);
            if (this.kind === "number") this.addSlider();
        }

        get input() {
            return this.box.querySelector(this.kind === "number" ? "input[type=number]" : "textarea, input, select");
        }

        get choicesShown() {
            const boxes = [...this.box.querySelectorAll("input[type=radio], input[type=checkbox]")];
            return boxes.map((input) => [input.closest("label").textContent.trim(), input]);
        }

        hideNativeHelp() {
            for (const element of this.box.querySelectorAll("*")) {
                if (element.textContent.trim() === this.help) element.classList.add(`${CSS}-hidden`);
            }
        }

        /** The `?`: the help stands under the field as long as it is asked for. */
        addHelp() {
            const id = `${this.box.id}_help`;
            const note = make("div", { class: `${CSS}-help`, id, hidden: true }, this.help);
            const ask = make(
                "button",
                {
                    type: "button",
                    class: `${CSS}-ask`,
                    "aria-expanded": "false",
                    "aria-controls": id,
                    "aria-label": `Help: ${this.label}`,
                    title: this.help,
                    onclick: () => {
                        note.hidden = !note.hidden;
                        ask.setAttribute("aria-expanded", String(!note.hidden));
                    },
                },
                "?",
            );
            this.box.append(ask, note);
        }

        /** A slider beside the number, over the range that is of use; beyond it the number is typed. */
        addSlider() {
            this.box.classList.add(`${CSS}-slides`);
            if (this.slider) {
                const [low, high, step] = this.slider;
                this.range = make("input", {
                    type: "range",
                    class: `${CSS}-range`,
                    min: low,
                    max: typeof high === "number" ? high : 150,
                    step,
                    "aria-label": `${this.label}, slider`,
                    oninput: () => type(this.input, this.range.value),
                });
                this.ask.before(this.range);
            }
            if (this.word) {
                this.spoken = make("span", { class: `${CSS}-word`, "aria-hidden": "true" }, this.word);
                this.box.append(this.spoken);
            }
        }

        get ask() {
            return this.box.querySelector(`.${CSS}-ask`);
        }

        read() {
            if (this.kind === "several") {
                return this.choicesShown.filter(([, input]) => input.checked).map(([text]) => text);
            }
            if (this.kind === "one") {
                const found = this.choicesShown.find(([, input]) => input.checked);
                return found ? found[0] : this.input.value;
            }
            if (this.kind === "tick") return this.input.checked;
            if (this.kind === "number") return this.input.value === "" ? "" : Number(this.input.value);
            return this.input.value;
        }

        write(value) {
            if (JSON.stringify(this.read()) === JSON.stringify(value)) return;
            if (this.name === "trajectory" && this.page.channel.gradio) {
                this.page.channel.ask({ kind: "choose", name: value });
            } else if (this.kind === "several" || this.kind === "one") {
                const wanted = new Set([].concat(value));
                for (const [text, input] of this.choicesShown) {
                    if (input.checked !== wanted.has(text) && !(input.type === "radio" && input.checked)) input.click();
                }
            } else if (this.kind === "tick") this.input.click();
            else type(this.input, value);
        }

        /** Shows what the value is: the slider's place, the word in a number's stead. */
        show(value, lastStep) {
            if (this.range) {
                if (typeof this.slider[1] !== "number") this.range.max = Math.max(1, lastStep);
                this.range.value = value;
                this.range.setAttribute("aria-valuetext", this.spells(value) ? this.word : String(value));
            }
            if (this.spoken) this.box.classList.toggle(`${CSS}-spelled`, this.spells(value));
        }

        spells(value) {
            return Boolean(this.word) && value === this.special;
        }

        isUsed(values) {
            const has = ([other, wanted]) => [].concat(values[other]).some((value) => wanted.includes(value));
            return this.ways.some((way) => way.every((need) => has(need) !== need[2]));
        }

        refuse(texts) {
            const text = texts.join("; ");
            if (this.error.textContent !== text) this.error.textContent = text;
            this.error.hidden = !text;
            for (const input of this.box.querySelectorAll("input, textarea")) {
                if (text) {
                    input.setAttribute("aria-invalid", "true");
                    input.setAttribute("aria-describedby", this.error.id);
                } else {
                    input.removeAttribute("aria-invalid");
                    input.removeAttribute("aria-describedby");
                }
            }
        }
    }

    // ---- Questions and answers ----------------------------------------------------------------------

    /** Asks Python, one question after the other: through the page's own hidden components or an address. */
    class Channel {
        constructor(told) {
            this.url = told.url || null;
            this.gradio = !this.url && told.answers;
            this.open = Boolean(this.url || this.gradio);
            this.count = 0;
            this.last = Promise.resolve();
            this.waiting = null;
            if (this.gradio) {
                const answers = document.getElementById(`${PREFIX}_answer`);
                new MutationObserver(() => this.hear(answers)).observe(answers, {
                    childList: true,
                    subtree: true,
                    attributes: true,
                });
            }
        }

        ask(question) {
            const asked = { id: ++this.count, ...question };
            this.last = this.last.then(() => (this.url ? this.post(asked) : this.say(asked))).catch(() => null);
            return this.last;
        }

        async post(asked) {
            const reply = await fetch(this.url, {
                method: "POST",
                headers: { "Content-Type": "application/json" },
                body: JSON.stringify(asked),
            });
            return reply.json();
        }

        say(asked) {
            return new Promise((resolve) => {
                const late = setTimeout(() => this.settle(null), ANSWER_WITHIN);
                this.waiting = { id: asked.id, late, resolve };
                type(document.querySelector(`#${PREFIX}_question textarea, #${PREFIX}_question input`), JSON.stringify(asked));
            });
        }

        hear(answers) {
            const told = answers.querySelector("[data-answer]");
            if (!told || !this.waiting) return;
            const answer = JSON.parse(told.dataset.answer);
            if (answer.id === this.waiting.id) this.settle(answer);
        }

        settle(answer) {
            const { late, resolve } = this.waiting;
            this.waiting = null;
            clearTimeout(late);
            resolve(answer);
        }
    }

    // ---- The schedule -------------------------------------------------------------------------------

    /** The kept levels' schedule indices, least noisy first: as lib_unsampler/core/schedule.py. */
    function keptLevels(sigmas, end, increment) {
        const last = sigmas.filter((sigma) => sigma > 0).length - 1;
        const kept = [];
        for (let index = Math.min(end, last); index <= last; index += increment) kept.push(index);
        return kept.reverse();
    }

    class Curve {
        constructor() {
            this.box = make("div", {
                class: `${CSS}-curve`,
                id: `${PREFIX}_curve`,
                tabindex: "0",
                role: "slider",
                "aria-label": "Noise schedule: a step's sigma",
                "aria-valuemin": "0",
                "aria-valuemax": "0",
                "aria-valuenow": "0",
                "aria-valuetext": "no schedule",
                onpointermove: (event) => this.point(event),
                onpointerleave: () => this.read(null),
                onblur: () => this.read(null),
                onkeydown: (event) => this.key(event),
            });
            this.said = make("div", { class: `${CSS}-readout`, id: `${PREFIX}_readout` });
            this.told = null;
            this.at = null;
            new ResizeObserver(() => this.redraw()).observe(this.box);
        }

        /** Says why there is no curve. */
        lack(text) {
            this.told = null;
            this.box.replaceChildren(make("p", { class: `${CSS}-none` }, text));
            delete this.box.dataset.kept;
            this.said.textContent = "";
        }

        /** `start`: the index where img2img's own sampling begins, or null where it is on another schedule. */
        show(schedule, kept, start) {
            this.told = { ...schedule, kept, start };
            if (this.at >= schedule.sigmas.length) this.at = null;
            this.box.dataset.kept = JSON.stringify(kept.map((index) => schedule.sigmas[index]));
            this.box.setAttribute("aria-valuemax", schedule.sigmas.length - 1);
            this.redraw();
        }

        redraw() {
            const width = this.box.clientWidth;
            if (!this.told || !width) return;
            const height = this.box.clientHeight || 96;
            const { sigmas, kept, start, flow } = this.told;
            const [left, right, top, bottom] = [44, width - 10, 12, height - 16];
            const noisy = sigmas.filter((sigma) => sigma > 0);
            const scale = flow ? (sigma) => sigma : (sigma) => Math.log(Math.max(sigma, noisy[noisy.length - 1]));
            const [low, high] = [flow ? 0 : scale(noisy[noisy.length - 1]), scale(noisy[0])];
            const x = (index) => left + (index / Math.max(1, sigmas.length - 1)) * (right - left);
            const y = (sigma) => bottom - ((scale(sigma) - low) / (high - low || 1)) * (bottom - top);
            this.x = x;
            const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
            svg.append(draw("path", { class: "axis", d: `M${left} ${top}V${bottom}H${right}` }));
            svg.append(draw("text", { x: left - 4, y: top + 6, "text-anchor": "end" }, short(noisy[0], 3)));
            svg.append(draw("text", { x: left - 4, y: bottom + 2, "text-anchor": "end" }, short(flow ? 0 : noisy[noisy.length - 1], 3)));
            svg.append(draw("text", { x: left, y: height - 2 }, "step 0"));
            svg.append(draw("text", { x: right, y: height - 2, "text-anchor": "end" }, String(sigmas.length - 1)));
            if (start !== null && start < sigmas.length) {
                svg.append(draw("path", { class: "start", d: `M${x(start)} ${top}V${bottom}` }));
                const near = x(start) > width / 2;
                const place = { x: x(start) + (near ? -4 : 4), y: top + 6, "text-anchor": near ? "end" : "start", class: "start" };
                svg.append(draw("text", place, "img2img starts"));
            }
            const line = sigmas.map((sigma, index) => `${index ? "L" : "M"}${x(index).toFixed(1)} ${y(sigma).toFixed(1)}`);
            svg.append(draw("path", { class: "line", d: line.join("") }));
            const dots = kept.map((index) => `M${x(index).toFixed(1)} ${y(sigmas[index]).toFixed(1)}h0`);
            svg.append(draw("path", { class: kept.length > 80 ? "dots small" : "dots", d: dots.join("") }));
            this.mark = draw("circle", { class: "mark", r: 5, visibility: "hidden" });
            svg.append(this.mark);
            this.y = y;
            this.box.replaceChildren(svg);
            this.read(this.at);
        }

        point(event) {
            if (!this.told) return;
            const across = event.clientX - this.box.getBoundingClientRect().left;
            const count = this.told.sigmas.length - 1;
            const index = Math.round(((across - this.x(0)) / (this.x(count) - this.x(0))) * count);
            this.read(Math.min(count, Math.max(0, index)));
        }

        key(event) {
            if (!this.told) return;
            const count = this.told.sigmas.length - 1;
            const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, Home: -count, End: count };
            if (!(event.key in moves)) return;
            event.preventDefault();
            this.read(Math.min(count, Math.max(0, (this.at ?? 0) + moves[event.key])));
        }

        describe(index) {
            const { sigmas, timesteps, kept } = this.told;
            const words = [`step ${index}`, `sigma ${short(sigmas[index])}`];
            if (timesteps && index < timesteps.length) words.push(`timestep ${short(timesteps[index])}`);
            if (kept.includes(index)) words.push("kept");
            return words.join(", ");
        }

        read(index) {
            this.at = index;
            if (!this.told) return;
            const { sigmas, kept, model, note } = this.told;
            const summary = `${kept.length} of ${sigmas.filter((s) => s > 0).length} levels, curve of ${model}${note ? `; ${note}` : ""}`;
            const text = index === null ? summary : this.describe(index);
            this.said.textContent = text;
            this.box.setAttribute("aria-valuenow", index ?? 0);
            this.box.setAttribute("aria-valuetext", text);
            if (!this.mark) return;
            this.mark.setAttribute("visibility", index === null ? "hidden" : "visible");
            if (index !== null) {
                this.mark.setAttribute("cx", this.x(index));
                this.mark.setAttribute("cy", this.y(sigmas[index]));
            }
        }
    }

    // ---- A zip file, stored ---------------------------------------------------------------------------

    const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
        let crc = byte;
        for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
        return crc >>> 0;
    });

    function crc32(bytes) {
        let crc = 0xffffffff;
        for (const byte of bytes) crc = CRC_TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
        return (crc ^ 0xffffffff) >>> 0;
    }

    /** A zip of [name, bytes] pairs, uncompressed: pictures are compressed already. */
    function zip(files) {
        const parts = [];
        const central = [];
        let offset = 0;
        for (const [name, bytes] of files) {
            const title = new TextEncoder().encode(name);
            const common = new DataView(new ArrayBuffer(26));
            common.setUint16(0, 20, true);
            common.setUint16(2, 0x0800, true);
            common.setUint32(6, 0x00210000, true);
            common.setUint32(10, crc32(bytes), true);
            common.setUint32(14, bytes.length, true);
            common.setUint32(18, bytes.length, true);
            common.setUint16(22, title.length, true);
            const place = new DataView(new ArrayBuffer(14));
            place.setUint32(10, offset, true);
            parts.push(new Uint8Array([0x50, 0x4b, 3, 4]), common, title, bytes);
            central.push(new Uint8Array([0x50, 0x4b, 1, 2, 20, 0]), common, place, title);
            offset += 30 + title.length + bytes.length;
        }
        const end = new DataView(new ArrayBuffer(22));
        end.setUint32(0, 0x06054b50, true);
        end.setUint16(8, files.length, true);
        end.setUint16(10, files.length, true);
        end.setUint32(12, central.reduce((sum, part) => sum + part.byteLength, 0), true);
        end.setUint32(16, offset, true);
        return new Blob([...parts, ...central, end], { type: "application/zip" });
    }

    function save(address, name) {
        const link = make("a", { href: address, download: name });
        document.body.append(link);
        link.click();
        link.remove();
    }

    // ---- The player -----------------------------------------------------------------------------------

    class Player {
        constructor(page) {
            this.page = page;
            this.frames = [];
            this.at = 0;
            this.timer = null;
            this.build();
            const place = document.querySelector(page.places.player);
            if (place) place.after(this.box);
            const gallery = document.querySelector(page.places.gallery);
            if (gallery) {
                new MutationObserver(() => this.soon()).observe(gallery, {
                    childList: true,
                    subtree: true,
                    attributes: true,
                    attributeFilter: ["src"],
                });
            }
            document.addEventListener("batch-unsampler-result", (event) => this.take(event.detail.result, event.detail.images));
        }

        build() {
            this.shown = make("img", { class: `${CSS}-frame`, alt: "" });
            this.source = make("img", { class: `${CSS}-source`, alt: "", hidden: true });
            this.view = make("div", { class: `${CSS}-view` }, this.shown, this.source);
            this.run = button("\u25b6", "Play", () => this.toggle(), { "aria-label": "Play" });
            this.scrub = make("input", {
                type: "range",
                min: 0,
                value: 0,
                "aria-label": "Frame",
                oninput: () => {
                    this.pause();
                    this.go(Number(this.scrub.value));
                },
            });
            const speeds = [0.25, 0.5, 1, 2, 4].map((s) => make("option", { value: s, selected: s === 1 }, `${s}\u00d7`));
            this.speed = make("select", { class: `${CSS}-choice`, "aria-label": "Speed" }, ...speeds);
            const attributes = { class: `${CSS}-choice`, "aria-label": "Image", hidden: true };
            this.image = make("select", { ...attributes, onchange: () => this.choose(Number(this.image.value)) });
            this.told = make("span", { class: `${CSS}-told`, id: `${PREFIX}_frame` });
            this.compare = button("Compare", "Wipe between the source and this frame", () => this.wipe(), { "aria-pressed": "false" });
            this.edge = make("input", {
                type: "range",
                min: 0,
                max: 100,
                value: 50,
                hidden: true,
                "aria-label": "Edge between source and frame",
                oninput: () => this.cut(),
            });
            this.start = button("Start from this level", "", () => this.startHere());
            this.film = button("Animation", "Download the animation", () => this.saveFilm());
            this.all = button("Frames (zip)", "Download every frame", () => this.saveFrames());
            this.latents = button("Latents", "Download the latents file", () => this.saveLatents());
            this.says = make("div", { class: `${CSS}-says`, role: "status" });
            const bar = make("div", { class: `${CSS}-bar` }, this.run, this.scrub, this.speed, this.image);
            const second = make("div", { class: `${CSS}-bar` }, this.told, this.compare, this.edge, this.start);
            const third = make("div", { class: `${CSS}-bar` }, make("span", {}, "Download"), this.film, this.all, this.latents);
            this.box = make(
                "section",
                { class: `${CSS}-player`, id: `${PREFIX}_player`, "aria-label": "Batch Unsampler: player", hidden: true },
                this.view,
                bar,
                second,
                third,
                this.says,
            );
        }

        /** The gallery changed: its pictures and the result's text come one after the other. */
        soon() {
            clearTimeout(this.later);
            this.later = setTimeout(() => this.look(), 250);
        }

        look() {
            const text = document.querySelector(this.page.places.result);
            const gallery = document.querySelector(this.page.places.gallery);
            if (!text || !gallery) return;
            let result;
            try {
                result = JSON.parse(text.value);
            } catch {
                return;
            }
            const thumbnails = gallery.querySelectorAll(".thumbnail-item img");
            const images = [...(thumbnails.length ? thumbnails : gallery.querySelectorAll("img"))].map((image) => image.src);
            const seen = JSON.stringify([text.value, images]);
            if (seen === this.seen || !images.length) return;
            this.seen = seen;
            this.take(result, images);
        }

        /**
         * Takes a result.
         * @param result The WebUI's JSON of it: all_seeds, steps, extra_generation_params with our keys.
         * @param images The pictures' addresses, in the order of the result's.
         */
        take(result, images) {
            const extra = result.extra_generation_params || {};
            const notes = extra["Unsampler images"];
            this.pause();
            this.box.hidden = true;
            if (!notes) return;
            this.result = result;
            this.settings = extra["Unsampler settings"] || {};
            this.files = extra["Unsampler latents names"] || [];
            const every = notes.map((note, index) => ({ ...note, address: images[index] }));
            this.items = every.filter((item) => item.address && !OWN.includes(item.kind));
            this.box.hidden = !this.items.length;
            if (this.box.hidden) return;
            const numbers = [...new Set(this.items.map((item) => item.image))];
            this.image.replaceChildren(...numbers.map((number) => make("option", { value: number }, `Image ${number + 1}`)));
            this.image.hidden = numbers.length < 2;
            this.choose(numbers[0]);
            this.page.forget();
        }

        choose(number) {
            const mine = this.items.filter((item) => item.image === number);
            this.number = number;
            this.frames = mine.filter((item) => item.kind === "frame");
            this.moving = mine.find((item) => item.kind === "animation") || null;
            const clean = this.frames.find((frame) => frame.sigma === 0 && !frame.part);
            const given = document.querySelector(this.page.places.source || "_");
            this.origin = clean ? clean.address : given && given.src ? given.src : null;
            const some = this.frames.length > 1;
            for (const element of [this.run, this.scrub, this.speed]) element.disabled = !some;
            this.scrub.max = Math.max(0, this.frames.length - 1);
            this.compare.disabled = !this.origin || !this.frames.length;
            this.film.disabled = !this.moving || this.moving.format === "mp4";
            this.film.title = !this.moving
                ? "No animation was asked for"
                : this.moving.format === "mp4"
                  ? "The MP4 is where the result's info says"
                  : "Download the animation";
            this.all.disabled = !this.frames.length;
            this.latents.disabled = !this.file;
            this.latents.title = this.file ? "Download the latents file" : "No latents file was saved: tick latents in the output";
            this.says.textContent = some ? "" : "Tick frames in the output to scrub through the levels.";
            this.go(some ? this.frames.length - 1 : 0);
        }

        /** The latents file of the shown image's batch. */
        get file() {
            const size = this.result.batch_size || 1;
            return this.files[Math.floor(this.number / size)] || null;
        }

        go(index) {
            this.at = index;
            const frame = this.frames[index] || this.moving;
            if (!frame) return;
            this.shown.src = frame.address;
            this.scrub.value = index;
            const clean = frame.sigma === 0;
            const level = clean ? "source, sigma 0" : `step ${frame.step}, sigma ${short(frame.sigma)}`;
            const words = frame.part === "result" ? "the picture, sigma 0" : level;
            this.told.textContent = frame.kind === "frame" ? words : "animation";
            this.shown.alt = frame.kind === "frame" ? `The picture at ${words}` : "The animation";
            this.scrub.setAttribute("aria-valuetext", words);
            const why = this.cannotStart(frame);
            this.start.disabled = Boolean(why);
            this.start.title = why || "Set the controls so that the next Generate starts from this very level";
        }

        toggle() {
            if (this.timer !== null) return this.pause();
            this.run.textContent = "\u275a\u275a";
            this.run.title = "Pause";
            this.run.setAttribute("aria-label", "Pause");
            if (this.at >= this.frames.length - 1) this.at = -1;
            return this.next();
        }

        next() {
            const pause = (1000 * (this.settings.duration || 0.1)) / Number(this.speed.value);
            this.go((this.at + 1) % this.frames.length);
            this.timer = setTimeout(() => this.next(), pause);
        }

        pause() {
            clearTimeout(this.timer);
            this.timer = null;
            this.run.textContent = "\u25b6";
            this.run.title = "Play";
            this.run.setAttribute("aria-label", "Play");
        }

        wipe() {
            const on = this.source.hidden;
            this.source.src = this.origin;
            this.source.hidden = this.edge.hidden = !on;
            this.compare.setAttribute("aria-pressed", String(on));
            this.cut();
        }

        cut() {
            this.source.style.clipPath = `inset(0 ${100 - Number(this.edge.value)}% 0 0)`;
        }

        saveFilm() {
            const ending = { gif: "gif", webp: "webp", apng: "png" }[this.moving.format];
            save(this.moving.address, `unsampled-${this.result.seed}.${ending}`);
        }

        async saveFrames() {
            this.says.textContent = "Gathering the frames\u2026";
            try {
                const files = [];
                for (const [index, frame] of this.frames.entries()) {
                    const reply = await fetch(frame.address);
                    const kind = (reply.headers.get("Content-Type") || "image/png").split("/")[1].split(";")[0];
                    const level = frame.step === null ? "source" : `step-${frame.step}`;
                    const name = `frame-${String(index).padStart(4, "0")}-${level}.${kind === "jpeg" ? "jpg" : kind}`;
                    files.push([name, new Uint8Array(await reply.arrayBuffer())]);
                }
                const address = URL.createObjectURL(zip(files));
                save(address, `unsampled-${this.result.seed}-frames.zip`);
                setTimeout(() => URL.revokeObjectURL(address), 60000);
                this.says.textContent = "";
            } catch (error) {
                this.says.textContent = `The frames could not be gathered: ${error.message}`;
            }
        }

        async saveLatents() {
            const name = this.file.split("/").pop();
            if (this.page.places.latents) return save(this.page.places.latents + this.file, name);
            const files = document.getElementById(`${PREFIX}_file`);
            const ready = () => [...files.querySelectorAll("a[href]")].find((link) => decodeURIComponent(link.href).endsWith(name));
            const answer = await this.page.channel.ask({ kind: "fetch", name: this.file });
            if (!answer || answer.error) {
                this.says.textContent = answer ? answer.error : "No answer";
                return null;
            }
            if (ready()) return save(ready().href, name);
            const watch = new MutationObserver(() => {
                if (!ready()) return;
                watch.disconnect();
                save(ready().href, name);
            });
            watch.observe(files, { childList: true, subtree: true, attributes: true });
            return setTimeout(() => watch.disconnect(), ANSWER_WITHIN);
        }

        /** Whether this run's levels come back by seed and step alone. */
        get bySeed() {
            return this.settings.mode === "noise" && this.settings.noise === "shared" && !this.settings.trajectory;
        }

        cannotStart(frame) {
            if (frame.kind !== "frame") return "Tick frames in the output to start from one of them";
            if (frame.part) return "This is of the sampling; start from a level of the noising";
            if (frame.step === null) return "The source itself has no noise to start from";
            const now = this.page.host().sampler;
            if (now && this.result.sampler_name && now !== this.result.sampler_name) {
                return `This level is of ${this.result.sampler_name}; the sampler is now ${now}`;
            }
            if (this.bySeed || this.settings.mode === "replay" || this.settings.trajectory || this.file) return "";
            return "No latents file was saved of this run: tick latents in the output and generate again";
        }

        async startHere() {
            const frame = this.frames[this.at];
            const run = this.settings;
            const noisiest = Math.min(...this.frames.filter((f) => f.step !== null).map((f) => f.step));
            const wanted = { output: ["init"], mode: "noise", noise: "shared", normalize: false, steps: 0 };
            Object.assign(wanted, { end_at_step: -1, step_increment: 1, skip: 0, panel: false, report: false, trajectory: "" });
            if (this.bySeed) Object.assign(wanted, { end_at_step: frame.step, normalize: Boolean(run.normalize) });
            else if (run.mode === "replay") {
                const same = ["mode", "positive", "negative", "cfg", "trajectory", "normalize"];
                for (const name of same) wanted[name] = run[name];
                const start = run.trajectory ? -1 : noisiest;
                Object.assign(wanted, { end_at_step: start, skip: frame.step - noisiest });
            } else {
                const name = run.trajectory || this.file;
                const answer = await this.page.channel.ask({ kind: "choose", name, step: frame.step });
                if (!answer || answer.error) {
                    this.says.textContent = answer ? answer.error : "No answer";
                    return;
                }
                wanted.trajectory = answer.name;
                await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
            }
            const steps = run.steps || this.result.steps;
            const host = { seed: this.result.all_seeds[0] };
            if (steps && !(run.output || []).includes("init")) {
                host.steps = steps;
                if (this.page.fixed) host.denoising_strength = 1;
            }
            this.page.set(wanted, host);
            this.says.textContent = `Generate now starts from step ${frame.step}, sigma ${short(frame.sigma)}.`;
        }
    }

    // ---- The page -------------------------------------------------------------------------------------

    class Page {
        constructor(stage) {
            this.stage = stage;
            this.root = document.getElementById(PREFIX);
            const told = JSON.parse(stage.dataset.form);
            this.hooks = told.host;
            this.places = told.places;
            this.presets = told.presets;
            this.channel = new Channel(told);
            this.fields = new Map(told.fields.map((field) => [field.name, new Field(field, this)]));
            this.schedules = new Map();
            this.curve = new Curve();
            this.fixed = false;
            this.refused = new Set();
            this.more = false;
            this.build();
            this.root.classList.add(`${CSS}-live`);
            this.player = new Player(this);
            this.listen();
            this.update();
        }

        build() {
            this.cost = make("div", { class: `${CSS}-cost`, id: `${PREFIX}_cost` });
            this.warning = make("div", { class: `${CSS}-warning`, id: `${PREFIX}_warning`, role: "status", hidden: true });
            this.general = make("div", { class: `${CSS}-error`, id: `${PREFIX}_general`, role: "status", hidden: true });
            const options = this.presets.map(({ name, help }) => make("option", { value: name, title: help }, name));
            this.preset = make(
                "select",
                { id: `${PREFIX}_preset`, class: `${CSS}-choice`, "aria-label": "Preset", onchange: () => this.choosePreset() },
                make("option", { value: "" }, "Presets\u2026"),
                ...options,
            );
            const reset = button("Reset", "Every field as it was at first", () => this.reset(), { id: `${PREFIX}_reset` });
            const head = make("div", { class: `${CSS}-head` }, this.preset, reset, this.curve.said);
            this.stage.replaceChildren(head, this.curve.box, this.cost, this.warning, this.general);
            this.fold();
        }

        /** What not every run needs is behind a button. */
        fold() {
            const more = document.getElementById(`${PREFIX}_more`);
            if (!more) return;
            const toggle = button("\u25b8 More: frames, animation, latents file", "", () => {
                const open = toggle.getAttribute("aria-expanded") !== "true";
                toggle.setAttribute("aria-expanded", String(open));
                toggle.firstChild.data = `${open ? "\u25be" : "\u25b8"} More: frames, animation, latents file`;
                this.more = open;
                this.showFolded();
            });
            toggle.setAttribute("aria-expanded", "false");
            toggle.setAttribute("aria-controls", more.id);
            toggle.classList.add(`${CSS}-fold`);
            more.before(toggle);
            this.showFolded();
        }

        /** A refused field is seen also where its panel is closed. */
        showFolded() {
            const more = document.getElementById(`${PREFIX}_more`);
            if (!more) return;
            const needed = [...this.refused].some((name) => this.fields.has(name) && more.contains(this.fields.get(name).box));
            more.classList.toggle(`${CSS}-folded`, !this.more && !needed);
        }

        listen() {
            const changed = () => this.changed();
            for (const event of ["input", "change", "click", "keyup", "batch-unsampler-changed"]) {
                document.addEventListener(event, changed, true);
            }
            this.root.addEventListener("pointerenter", () => this.changed(true));
        }

        /** Something may have changed: looks once before the next frame is painted, and once the host has followed. */
        changed(again = false) {
            if (again === true) this.seen = null;
            if (this.frame) return;
            this.frame = requestAnimationFrame(() => {
                this.frame = null;
                this.update();
            });
            clearTimeout(this.settled);
            this.settled = setTimeout(() => this.update(), 400);
        }

        values() {
            return Object.fromEntries([...this.fields].map(([name, field]) => [name, field.read()]));
        }

        /** The request's own controls, as far as this host has them; what it says itself counts where it is seen. */
        host() {
            const told = {};
            for (const [name, selector] of Object.entries(this.hooks)) {
                const found = [...document.querySelectorAll(selector)];
                const input = found.find((element) => element.type === "radio" && element.checked) || found[0];
                if (!input) continue;
                if ("value" in input) told[name] = input.type === "number" ? Number(input.value) : input.value;
                else if (input.checkVisibility()) told[name] = input.textContent.trim();
            }
            return told;
        }

        set(values, host = {}) {
            for (const [name, value] of Object.entries(values)) this.fields.get(name)?.write(value);
            for (const [name, value] of Object.entries(host)) {
                const input = document.querySelector(this.hooks[name] || "_");
                if (input && Number(input.value) !== value) type(input, value);
            }
            this.changed();
        }

        reset() {
            this.set(Object.fromEntries([...this.fields].map(([name, field]) => [name, field.default])));
        }

        choosePreset() {
            const chosen = this.presets.find(({ name }) => name === this.preset.value);
            this.preset.value = "";
            if (!chosen) return;
            const defaults = Object.fromEntries([...this.fields].map(([name, field]) => [name, field.default]));
            this.set({ ...defaults, ...chosen.values });
        }

        /** What the sigmas depend on. */
        key(values, host) {
            const samples = (values.output || []).includes("init");
            const steps = samples || !values.steps ? host.steps : values.steps;
            const strength = this.fixed ? host.denoising_strength : null;
            const size = host.resized || [host.width, host.height];
            return JSON.stringify([samples, steps, strength, values.trajectory, host.sampler, host.scheduler, host.distilled_cfg_scale, size]);
        }

        /** The schedule was made by another model, or may be. */
        forget() {
            this.schedules.clear();
            this.seen = null;
            this.changed();
        }

        update() {
            const values = this.values();
            const host = this.host();
            const seen = JSON.stringify([values, host, this.stage.offsetParent !== null]);
            if (seen === this.seen) return;
            this.seen = seen;
            for (const [name, field] of this.fields) {
                field.box.classList.toggle(`${CSS}-unused`, !field.isUsed(values) && !this.refused.has(name));
            }
            const known = this.schedules.get(this.key(values, host));
            const last = known?.sigmas ? known.sigmas.filter((sigma) => sigma > 0).length - 1 : (host.steps || 20) - 1;
            for (const [name, field] of this.fields) field.show(values[name], last);
            this.redraw(values, host, known);
            clearTimeout(this.asking);
            if (this.channel.open && this.stage.offsetParent !== null) {
                this.asking = setTimeout(() => this.ask(values, host), ASK_AFTER);
            }
        }

        redraw(values, host, schedule) {
            if (!schedule) return;
            if (!schedule.sigmas) {
                this.curve.lack(schedule.none);
                return;
            }
            const samples = (values.output || []).includes("init");
            const own = this.ownStart(schedule, host);
            const start = values.end_at_step >= 0 ? values.end_at_step : samples ? own : 0;
            const every = Math.max(1, values.step_increment || 1);
            const kept = schedule.kept || keptLevels(schedule.sigmas, start, every);
            this.curve.show(schedule, kept, schedule.total === schedule.own[0] && !values.trajectory ? own : null);
        }

        /** img2img's start level, as the WebUI's setup_img2img_steps counts it. */
        ownStart(schedule, host) {
            if (schedule.fixed) return schedule.own[1];
            return host.steps - Math.trunc(Math.min(host.denoising_strength, 0.999) * host.steps) - 1;
        }

        async ask(values, host) {
            const key = this.key(values, host);
            const wants = this.schedules.has(key) ? ["check"] : ["schedule", "check"];
            this.asked = { wants, key };
            const answer = await this.channel.ask({ kind: "ask", wants, values, host });
            if (!answer) return;
            if (answer.error) {
                this.say([{ field: "", text: answer.error }], [], "");
                return;
            }
            if (answer.schedule) this.learn(key, answer.schedule);
            if (answer.check && this.isNow(values, host)) {
                const { errors, said, warning, model } = answer.check;
                this.say(errors, said || [], warning || "");
                const known = this.schedules.get(this.key(values, host));
                if (model && known?.model && known.model !== model) this.forget();
            }
        }

        isNow(values, host) {
            return JSON.stringify([values, host]) === JSON.stringify([this.values(), this.host()]);
        }

        learn(key, schedule) {
            if (this.schedules.size > 200) this.schedules.clear();
            const wasFixed = this.fixed;
            this.fixed = schedule.fixed ?? this.fixed;
            const values = this.values();
            const host = this.host();
            if (schedule.sigmas) this.schedules.set(wasFixed === this.fixed ? key : this.key(values, host), schedule);
            if (this.key(values, host) === key || wasFixed !== this.fixed) {
                const last = schedule.sigmas ? schedule.sigmas.filter((sigma) => sigma > 0).length - 1 : 1;
                for (const [name, field] of this.fields) field.show(values[name], last);
                this.redraw(values, host, schedule);
            }
        }

        say(errors, said, warning) {
            this.cost.textContent = said.join(" \u00b7 ");
            this.warning.textContent = warning;
            this.warning.hidden = !warning;
            const of = (name) => errors.filter(({ field }) => field === name).map(({ text }) => text);
            const rest = errors.filter(({ field }) => !this.fields.has(field)).map(({ text }) => text);
            this.general.textContent = rest.join("; ");
            this.general.hidden = !rest.length;
            this.refused = new Set(errors.map(({ field }) => field));
            this.showFolded();
            const values = this.values();
            for (const [name, field] of this.fields) {
                field.refuse(of(name));
                field.box.classList.toggle(`${CSS}-unused`, !field.isUsed(values) && !this.refused.has(name));
            }
        }
    }

    /** Begins when the form is on the page, which the host builds some time after this file is read. */
    function begin() {
        const stage = document.querySelector(`.${CSS}-stage[data-form]`);
        if (!stage) return false;
        const { fields } = JSON.parse(stage.dataset.form);
        if (!fields.every(({ name }) => document.getElementById(`${PREFIX}_${name}`))) return false;
        new Page(stage);
        return true;
    }

    function wait() {
        if (begin()) return;
        const watch = new MutationObserver(() => {
            if (begin()) watch.disconnect();
        });
        watch.observe(document.documentElement, { childList: true, subtree: true });
    }

    if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", wait);
    else wait();
})();
