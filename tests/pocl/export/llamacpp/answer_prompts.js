// Answers conversations greedily by llama.cpp, from nothing but a GGUF file.
//
// Standard input: {"model": path, "cache": "F32" or "F16", "max_tokens": n, "texts": [...], "conversations": [[message, ...], ...]}
// Standard output: {"llama_cpp": release, "texts": [[id, ...], ...], "conversations": [{"rendered", "prompt", "ids", "text", "ended"}, ...]}

import {readFileSync} from "node:fs";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const request = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, maxThreads: 1, logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: request.model});
const context = await model.createContext({
    contextSize: 256,
    flashAttention: false,
    experimentalKvCacheKeyType: request.cache,
    experimentalKvCacheValueType: request.cache
});
const sequence = context.getSequence();
// The class of the package itself tries a JavaScript engine first; this is that of llama.cpp. The version is pinned.
const template = new llama._bindings.AddonJinjaRenderer(model.fileInfo.metadata.tokenizer.chat_template);

function tokenize(text) {
    const begin = model.tokens.shouldPrependBosToken ? [model.tokens.bos] : [];
    return [...begin, ...model.tokenize(text, true)];
}

async function answer(messages) {
    const rendered = template.render({messages, add_generation_prompt: true});
    // What a template prints is the whole prompt: nothing is put before it.
    const prompt = model.tokenize(rendered, true);
    await sequence.clearHistory();
    const ids = [];
    let ended = false;
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        ids.push(token);
        ended = model.isEogToken(token);
        if (ended || ids.length === request.max_tokens)
            break;
    }
    return {rendered, prompt, ids, text: model.detokenize(ended ? ids.slice(0, -1) : ids), ended};
}

const conversations = [];
for (const messages of request.conversations)
    conversations.push(await answer(messages));
const texts = request.texts.map(tokenize);
process.stdout.write(JSON.stringify({llama_cpp: llama.llamaCppRelease.release, texts, conversations}));
await llama.dispose();
