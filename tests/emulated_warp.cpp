// Runs the CUDA kernels of window4.cu on a CPU, so that they are tested where there is no GPU: the 32 lanes of a warp are
// fibers that take turns, and what lanes exchange (shuffles, matrix products, transposition) is done as the PTX manual
// says it is spread over them. Compiled with a kernel's own macros, KERNEL, its name, and KERNELS, the
// path of window4.cu, and with -fsanitize=kernel-address, by which the compiler tells of each access to memory.

#include <cmath>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <link.h>
#include <tuple>
#include <ucontext.h>
#include <utility>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(16) quad { unsigned int x[4]; };
struct position { int x, y, z; };
static position threadIdx, blockIdx;  // of the lane whose turn it is

static const int LANES = 32;
static ucontext_t lanes[LANES], finished;
static int lane;
static unsigned int sent[2][LANES][6];

// Every access has to be to a tensor that the kernel was given, or to what is this file's own, as the stacks of the lanes.
// Nor may a warp touch what another one writes, since on a GPU they run at the same time: hence the warps of each 2 bytes.
#define UNWATCHED __attribute__((no_sanitize("kernel-address")))
enum { NOBODY = -1, SEVERAL = -2 };
struct Span { size_t begin, end; int *reader, *writer; };
static Span spans[32], own;
static int strays, races, unwatched = 1;

UNWATCHED static void touch(size_t begin, size_t bytes, bool writes) {
    size_t end = begin + bytes;
    if (unwatched || (own.begin <= begin && end <= own.end)) return;
    Span* span = spans;
    while (span->begin && (begin < span->begin || span->end < end)) span++;
    if (!span->begin) { strays++; setcontext(&finished); }  // and so does no harm
    int warp = ((blockIdx.z << 10 | blockIdx.y) << 10 | blockIdx.x) * WARPS + threadIdx.x / 32;
    for (size_t i = (begin - span->begin) / 2; i < (end - span->begin) / 2; i++) {
        int &reader = span->reader[i], &writer = span->writer[i];
        races += (writer != NOBODY && writer != warp) || (writes && reader != NOBODY && reader != warp);
        if (writes) writer = warp;
        else reader = reader == NOBODY || reader == warp ? warp : SEVERAL;
    }
}

extern "C" {
#define TOLD_OF(size) \
    UNWATCHED void __asan_load##size##_noabort(size_t at) { touch(at, size, false); } \
    UNWATCHED void __asan_store##size##_noabort(size_t at) { touch(at, size, true); }
TOLD_OF(1) TOLD_OF(2) TOLD_OF(4) TOLD_OF(8) TOLD_OF(16)
UNWATCHED void __asan_loadN_noabort(size_t at, size_t bytes) { touch(at, bytes, false); }
UNWATCHED void __asan_storeN_noabort(size_t at, size_t bytes) { touch(at, bytes, true); }
void __asan_handle_no_return() {}
void __asan_before_dynamic_init() {}
void __asan_after_dynamic_init() {}
}

static int find_own(dl_phdr_info* info, size_t, void*) {
    Span all = {~0ul, 0};
    for (int i = 0; i < info->dlpi_phnum; i++) {
        if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
        size_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr, end = begin + info->dlpi_phdr[i].p_memsz;
        if (begin < all.begin) all.begin = begin;
        if (end > all.end) all.end = end;
    }
    if (all.begin <= (size_t)&own && (size_t)&own < all.end) own = all;
    return 0;
}

static void give_turn() {
    int mine = lane, thread = threadIdx.x;
    int next = (lane + 1) % LANES;
    lane = next;
    swapcontext(&lanes[mine], &lanes[next]);
    lane = mine;
    threadIdx.x = thread;
}

// What every lane sends in this exchange. A lane may send again before the last one has read: hence two places.
static int exchanges[LANES];
static unsigned int (*exchange(std::initializer_list<unsigned int> words))[6] {
    unsigned int (*all)[6] = sent[exchanges[lane]++ % 2];
    int i = 0;
    for (unsigned int word : words) all[lane][i++] = word;
    give_turn();
    return all;
}

static float as_float(unsigned int x) { float y; std::memcpy(&y, &x, 4); return y; }
static unsigned int as_bits(float x) { unsigned int y; std::memcpy(&y, &x, 4); return y; }
static float rsqrtf(float x) { return 1 / std::sqrt(x); }

#if HALF
static float number(unsigned int x) { _Float16 y; unsigned short bits = x; std::memcpy(&y, &bits, 2); return y; }
static unsigned int rounded(float x) { _Float16 y = x; unsigned short bits; std::memcpy(&bits, &y, 2); return bits; }
#else
static float number(unsigned int x) { return as_float(x << 16); }
static unsigned int rounded(float x) {
    unsigned int bits = as_bits(x);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16 & 0xffff;
}
#endif

static void unpack(unsigned int x, float& low, float& high) { low = number(x & 0xffff); high = number(x >> 16); }
static unsigned int pack(float low, float high) { return rounded(low) | rounded(high) << 16; }
static float half_of(unsigned int x, int which) { return number(which ? x >> 16 : x & 0xffff); }

// c += a b for a (16 x depth) and b (depth x 8); `left` and `right` are where the lanes' words of a and b begin.
static void multiply(float* c, unsigned int (*all)[6], int depth) {
    int words = depth / 4, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < depth; k++) {
            int column = 2 * t + i % 2, holder = k % 8 / 2;
            unsigned int a = all[4 * g + holder][i / 2 + 2 * (k / 8)], b = all[4 * column + holder][words + k / 8];
            c[i] += half_of(a, k % 2) * half_of(b, k % 2);
        }
}

static void multiply16(
    float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1
) {
    multiply(c, exchange({a0, a1, a2, a3, b0, b1}), 16);
}

static void multiply8(float* c, unsigned a0, unsigned a1, unsigned b0) { multiply(c, exchange({a0, a1, b0}), 8); }

static float from_lane_xor(float x, int mask) {
    unsigned int (*all)[6] = exchange({as_bits(x)});
    return as_float(all[lane ^ mask][0]);
}

static unsigned int transpose(unsigned int x) {
    unsigned int (*all)[6] = exchange({x});
    int g = lane / 4, t = lane % 4, shift = 16 * (g % 2);
    return (all[4 * (2 * t) + g / 2][0] >> shift & 0xffff) | (all[4 * (2 * t + 1) + g / 2][0] >> shift & 0xffff) << 16;
}

static float from_lane(float x, int other) {
    unsigned int (*all)[6] = exchange({as_bits(x)});
    return as_float(all[other][0]);
}

// What is copied may come at once or as late as when it is waited for: every other copy does the one, the rest the other.
// A row that is read before, or that is needed after, shows.
struct Copy { void* to; const void* from; int bytes; bool present; };
static std::deque<std::vector<Copy>> copies[LANES];  // by groups; the last one is open
static bool at_once[LANES];

static void carry_out(Copy c) {
    std::memset(c.to, 0, c.bytes);
    if (c.present) std::memcpy(c.to, c.from, c.bytes);
}

static void copy(void* to, const void* from, int bytes, bool present) {
    if (present) touch((size_t)from, bytes, false);
    unwatched++;
    if (copies[lane].empty()) copies[lane].emplace_back();
    Copy c = {to, from, bytes, present};
    if ((at_once[lane] ^= 1)) carry_out(c);
    else copies[lane].back().push_back(c);
    unwatched--;
}
static void copy16(void* to, const void* from, bool present) { copy(to, from, 16, present); }
static void copy4(void* to, const void* from, bool present) { copy(to, from, 4, present); }
static void close_group() {
    unwatched++;
    copies[lane].emplace_back();
    unwatched--;
}
static void WAIT_FOR_ALL_GROUPS_BUT(int pending) {
    unwatched++;
    for (; (int)copies[lane].size() > pending + 1; copies[lane].pop_front())
        for (Copy c : copies[lane].front()) carry_out(c);
    unwatched--;
}

static void converge() { give_turn(); }
static float exp2_of(float x) { return std::exp2(x); }

#include KERNELS

// A launch: blocks of WARPS warps, arguments as cuLaunchKernel takes them.
template <class... A> struct Launch {
    static void (*kernel)(A...);
    static std::tuple<A...> args;
    static position grid;

    template <size_t... I> static void take(void** given, std::index_sequence<I...>) { args = {*(A*)given[I]...}; }

    static void run(int mine) {
        for (int block = 0; block < grid.x * grid.y * grid.z; block++)
            for (int warp = 0; warp < WARPS; warp++) {
                blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
                threadIdx.x = 32 * warp + mine;
                std::apply(kernel, args);
                give_turn();  // all lanes are done with this warp before the next one
            }
        if (mine + 1 < LANES) { lane = mine + 1; setcontext(&lanes[mine + 1]); }
        setcontext(&finished);
    }
};
template <class... A> void (*Launch<A...>::kernel)(A...);
template <class... A> std::tuple<A...> Launch<A...>::args;
template <class... A> position Launch<A...>::grid;

template <class... A> static void launch(void (*kernel)(A...), void** args, position grid) {
    using L = Launch<A...>;
    L::kernel = kernel;
    L::take(args, std::index_sequence_for<A...>{});
    L::grid = grid;
    static char stacks[LANES][1 << 16];
    for (int i = 0; i < LANES; i++) {
        exchanges[i] = 0;
        copies[i].clear();
        getcontext(&lanes[i]);
        lanes[i].uc_stack = {stacks[i], 0, sizeof stacks[i]};
        lanes[i].uc_link = nullptr;
        makecontext(&lanes[i], (void (*)())L::run, 1, i);
    }
    blockIdx = {0, 0, 0};
    lane = 0;
    volatile bool started = false;
    getcontext(&finished);
    if (!started) {
        started = true;
        unwatched = 0;
        setcontext(&lanes[0]);
    }
    unwatched = 1;
}

// `faults`: accesses outside of the `count` tensors from `begins` to `ends`, after which nothing is done any more; and
// those to what another warp writes.
extern "C" void launch_kernel(void** args, int x, int y, int z, int count, size_t* begins, size_t* ends, int* faults) {
    dl_iterate_phdr(find_own, nullptr);
    std::vector<std::vector<int>> warps(2 * count);
    for (int i = 0; i < count; i++) {
        for (int j = 0; j < 2; j++) warps[2 * i + j].assign((ends[i] - begins[i]) / 2, NOBODY);
        spans[i] = {begins[i], ends[i], warps[2 * i].data(), warps[2 * i + 1].data()};
    }
    spans[count] = {};
    strays = races = 0;
    launch(KERNEL, args, {x, y, z});
    faults[0] = strays;
    faults[1] = races;
}
