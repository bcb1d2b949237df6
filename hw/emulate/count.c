// A qemu plugin that counts the RV64GC instructions a program executes, by class, and prints the totals at every mark of probe.cpp:
//     qemu-riscv64 -plugin count.so PROGRAM
// writes lines "count THREADS LOAD STORE JUMP INTEGER MULTIPLY FLOAT OTHER" to stderr. The totals are right for one thread only: adds are not
// atomic. Debian ships no header of this interface (version 1, QEMU 4.2 to 8.2), so what is used of it is declared here.
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef struct {
    const char *target_name;
    struct { int min, cur; } version;
    bool system_emulation;
} info_t;  // what follows is for whole systems
enum { ADD = 0 };
void qemu_plugin_register_vcpu_init_cb(plugin_id, void (*)(plugin_id, unsigned));
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int operation, void *, uint64_t);
void qemu_plugin_register_vcpu_syscall_cb(plugin_id, void (*)(plugin_id, unsigned, int64_t number, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                                                          uint64_t, uint64_t));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

enum { LOAD, STORE, JUMP, INTEGER, MULTIPLY, FLOAT, OTHER, CLASSES };
static uint64_t executed[CLASSES];
static unsigned threads;

// Tables 24.1 and 16.5 to 16.7 of the RISC-V unprivileged specification (20191213). Loads and stores include those of floats, MULTIPLY divides too;
// OTHER: fences, atomics, system and vector instructions, and whatever is illegal.
static int class_of(uint32_t word, size_t size) {
    if (size == 2) {
        unsigned function = word >> 13 & 7;
        switch (word & 3) {
        case 0:
            return function == 0 ? (word & 0xffff ? INTEGER : OTHER) : function < 4 ? LOAD : function > 4 ? STORE : OTHER;
        case 1:
            return function < 5 ? INTEGER : JUMP;
        default:
            if (function == 4 && !(word >> 2 & 31)) return word >> 7 & 31 ? JUMP : OTHER;  // jr and jalr; ebreak
            return function == 0 || function == 4 ? INTEGER : function < 4 ? LOAD : STORE;
        }
    }
    switch (word & 0x7f) {
    case 0x03: case 0x07:
        return LOAD;
    case 0x23: case 0x27:
        return STORE;
    case 0x63: case 0x67: case 0x6f:
        return JUMP;
    case 0x13: case 0x1b: case 0x17: case 0x37:
        return INTEGER;
    case 0x33: case 0x3b:
        return word >> 25 == 1 ? MULTIPLY : INTEGER;
    case 0x43: case 0x47: case 0x4b: case 0x4f: case 0x53:
        return FLOAT;
    default:
        return OTHER;
    }
}

static void translated(plugin_id id, struct qemu_plugin_tb *block) {
    (void)id;
    uint64_t found[CLASSES] = {0};
    for (size_t i = 0; i < qemu_plugin_tb_n_insns(block); i++) {
        struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(block, i);
        uint32_t word = 0;
        memcpy(&word, qemu_plugin_insn_data(instruction), qemu_plugin_insn_size(instruction));
        found[class_of(word, qemu_plugin_insn_size(instruction))]++;
    }
    for (int c = 0; c < CLASSES; c++)  // one add a class and block, not one an instruction: a block that is entered runs to its end
        if (found[c]) qemu_plugin_register_vcpu_tb_exec_inline(block, ADD, &executed[c], found[c]);
}

static void called(plugin_id id, unsigned cpu, int64_t number, uint64_t file, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
    (void)id, (void)cpu, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
    if (number != 57 || (int64_t)file != -1000) return;  // close(-1000) is a mark
    fprintf(stderr, "count %u", threads);
    for (int i = 0; i < CLASSES; i++) fprintf(stderr, " %llu", (unsigned long long)executed[i]);
    fputc('\n', stderr);
}

static void started(plugin_id id, unsigned cpu) { (void)id, (void)cpu, threads++; }

__attribute__((visibility("default"))) int qemu_plugin_install(plugin_id id, const info_t *info, int argc, char **argv) {
    (void)argc, (void)argv;
    if (strcmp(info->target_name, "riscv64")) return fprintf(stderr, "count: expected riscv64, not %s\n", info->target_name), 1;
    qemu_plugin_register_vcpu_init_cb(id, started);
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    return 0;
}
