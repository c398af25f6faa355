// Runs the CUDA kernels of window4.cu on a CPU, so that they are tested where there is no GPU: the 32 lanes of a warp are
// fibers that take turns, and what lanes exchange (shuffles, matrix products, transposition) is done as the PTX manual
// says it is spread over them. Compiled with the kernels' own macros and KERNELS, the path of window4.cu.

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <ucontext.h>
#include <utility>

#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) quad { unsigned int x[4]; };
struct alignas(16) float4 { float x, y, z, w; };
struct position { int x, y; };
static position threadIdx, blockIdx;  // of the lane whose turn it is

static const int LANES = 32;
static ucontext_t lanes[LANES], finished;
static int lane;
static unsigned int sent[2][LANES][6];

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

static void converge() {}
static float exp2_of(float x) { return std::exp2(x); }

#include KERNELS

// A launch: blocks of 128 lanes, arguments as cuLaunchKernel takes them.
template <class... A> struct Launch {
    static void (*kernel)(A...);
    static void** args;
    static int grid_x, grid_y;

    template <size_t... I> static void call(std::index_sequence<I...>) { kernel(*(A*)args[I]...); }

    static void run(int mine) {
        for (int y = 0; y < grid_y; y++)
            for (int x = 0; x < grid_x; x++)
                for (int warp = 0; warp < 4; warp++) {
                    blockIdx = {x, y};
                    threadIdx.x = 32 * warp + mine;
                    call(std::index_sequence_for<A...>{});
                    give_turn();  // all lanes are done with this warp before the next one
                }
        if (mine + 1 < LANES) { lane = mine + 1; setcontext(&lanes[mine + 1]); }
        setcontext(&finished);
    }
};
template <class... A> void (*Launch<A...>::kernel)(A...);
template <class... A> void** Launch<A...>::args;
template <class... A> int Launch<A...>::grid_x;
template <class... A> int Launch<A...>::grid_y;

template <class... A> static void launch(void (*kernel)(A...), void** args, int grid_x, int grid_y) {
    using L = Launch<A...>;
    L::kernel = kernel;
    L::args = args;
    L::grid_x = grid_x;
    L::grid_y = grid_y;
    static char stacks[LANES][1 << 16];
    for (int i = 0; i < LANES; i++) {
        exchanges[i] = 0;
        getcontext(&lanes[i]);
        lanes[i].uc_stack = {stacks[i], 0, sizeof stacks[i]};
        lanes[i].uc_link = nullptr;
        makecontext(&lanes[i], (void (*)())L::run, 1, i);
    }
    blockIdx = {0, 0};
    lane = 0;
    volatile bool started = false;
    getcontext(&finished);
    if (!started) {
        started = true;
        setcontext(&lanes[0]);
    }
}

extern "C" void launch_window4_forward(void** args, int x, int y) { launch(window4_forward, args, x, y); }
extern "C" void launch_window4_backward(void** args, int x, int y) { launch(window4_backward, args, x, y); }
