// Greedy decoding with llama.cpp on one thread, the same program for the host and for riscv64:
//     probe MODEL.gguf 1,2,3 TOKENS LOGITS
// reads token ids, chooses TOKENS new ones (the first from the prompt's own pass, so TOKENS - 1 passes of one token follow), prints
// {"tokens": [...], "vocabulary": n} and writes the logits each was chosen from to LOGITS: float32, TOKENS rows of n.
// Every pass stands between two marks, which count.c sees: what loading, choosing and writing cost is outside of them.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

// Closing a file that cannot be open does nothing, and nobody else does it: a system call is what a qemu plugin can see of a program.
static void mark() { syscall(SYS_close, -1000L); }

static int fail(const char * why) {
    fprintf(stderr, "probe: %s\n", why);
    return 1;
}

int main(int argc, char ** argv) {
    if (argc != 5) return fail("expected MODEL.gguf IDS TOKENS LOGITS");
    llama_log_set([](ggml_log_level level, const char * text, void *) { if (level >= GGML_LOG_LEVEL_WARN) fputs(text, stderr); }, nullptr);
    std::vector<llama_token> feed, chosen;
    std::stringstream ids(argv[2]);
    for (std::string id; std::getline(ids, id, ',');) feed.push_back(std::stoi(id));
    const size_t tokens = std::stoul(argv[3]);

    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return fail("the file cannot be loaded");
    llama_context_params settings = llama_context_default_params();
    settings.n_ctx = settings.n_batch = feed.size() + tokens;
    settings.n_threads = settings.n_threads_batch = 1;
    llama_context * context = llama_init_from_model(model, settings);
    if (!context) return fail("no context");
    const int n = llama_vocab_n_tokens(llama_model_get_vocab(model));
    for (llama_token id : feed)
        if (id < 0 || id >= n) return fail("a token beyond the vocabulary");

    std::vector<float> logits;
    while (chosen.size() < tokens) {
        mark();
        const int status = llama_decode(context, llama_batch_get_one(feed.data(), feed.size()));
        llama_synchronize(context);
        mark();
        if (status) return fail("decoding failed");
        const float * row = llama_get_logits_ith(context, -1);
        chosen.push_back(std::max_element(row, row + n) - row);
        logits.insert(logits.end(), row, row + n);
        feed.assign(1, chosen.back());
    }

    FILE * file = fopen(argv[4], "wb");
    if (!file || fwrite(logits.data(), sizeof(float), logits.size(), file) != logits.size() || fclose(file)) return fail("the logits cannot be written");
    printf("{\"tokens\": [");
    for (size_t i = 0; i < chosen.size(); i++) printf("%s%d", i ? ", " : "", chosen[i]);
    printf("], \"vocabulary\": %d}\n", n);
    llama_free(context);
    llama_model_free(model);
}
