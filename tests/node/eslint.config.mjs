// Every rule of ESLint's recommended set, and what keeps one file readable and alone in its page.
import js from "@eslint/js";

const browser = [
    "Blob", "CustomEvent", "Event", "FileReader", "MutationObserver", "ResizeObserver", "TextDecoderStream", "TextEncoder",
    "URL", "cancelAnimationFrame", "clearTimeout", "document", "fetch", "matchMedia", "requestAnimationFrame",
    "setTimeout",
];

export default [
    js.configs.recommended,
    {
        files: ["**/*.js"],
        languageOptions: {
            ecmaVersion: 2022,
            sourceType: "script",
            globals: Object.fromEntries(browser.map((name) => [name, "readonly"])),
        },
        linterOptions: { reportUnusedDisableDirectives: "error" },
        rules: {
            "eqeqeq": "error",
            "max-depth": ["error", 4],
            "max-len": ["error", { code: 150 }],
            "no-console": "error",
            "no-eval": "error",
            "no-implicit-globals": "error",
            "no-restricted-globals": ["error", "setInterval", "window", "globalThis", "opts", "gradioApp"],
            "no-shadow": "error",
            "no-var": "error",
            "prefer-const": "error",
            "strict": ["error", "function"],
        },
    },
];
