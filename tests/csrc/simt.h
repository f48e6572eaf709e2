// CUDA kernels on the CPU, for the tests: what csrc/cuda takes from the CUDA runtime.
//
// Each thread of a block is a fiber that runs until it meets a barrier or a shuffle. The order of
// blocks and of threads comes from a seed, and shared memory is NaN before each block, so that what
// depends on a missing barrier differs from seed to seed.
#pragma once
#include <link.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

struct dim3 {
  unsigned x;
  explicit dim3(unsigned size) : x(size) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace simt {

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;

enum class State { ready, at_barrier, at_shuffle, exited };

struct Thread {
  Fiber fiber;
  State state = State::exited;
  dim3 index{0};
  // Of the barrier or the shuffle at which it waits.
  int line = 0;
  unsigned mask = 0;
  unsigned lane_mask = 0;
  uint64_t value = 0;

  unsigned lane() const { return index.x % kLanes; }
};

struct Machine {
  std::vector<Thread> threads = std::vector<Thread>(kMaxThreads);
  dim3 grid{0}, block{0}, block_index{0};
  const std::function<void()>* kernel = nullptr;
  Thread* running = nullptr;
  unsigned seed = 0;
  std::mt19937 random;
  std::string error;
};

inline Machine& machine() {
  static Machine machine;
  return machine;
}

[[noreturn]] inline void fail(const Thread& thread, const std::string& what) {
  throw std::runtime_error(what + ": block " + std::to_string(machine().block_index.x) +
                           ", thread " + std::to_string(thread.index.x) + ", line " +
                           std::to_string(thread.line));
}

inline void run_thread() {
  Machine& m = machine();
  try {
    (*m.kernel)();
  } catch (const std::exception& error) {
    m.error = error.what();
  }
  m.running->state = State::exited;
}

inline void wait(State state, int line) {
  Thread& thread = *machine().running;
  thread.state = state;
  thread.line = line;
  thread.fiber.pause();
}

template <class T>
T shuffle_xor(unsigned mask, T value, unsigned lane_mask, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Thread& thread = *machine().running;
  thread.mask = mask;
  thread.lane_mask = lane_mask;
  std::memcpy(&thread.value, &value, sizeof value);
  wait(State::at_shuffle, line);
  std::memcpy(&value, &thread.value, sizeof value);
  return value;
}

// Exchanges the values of a warp once all lanes of the mask have come to the shuffle of `last`.
inline void try_shuffle(const Thread& last) {
  Machine& m = machine();
  Thread* warp = &m.threads[last.index.x / kLanes * kLanes];
  if (!(last.mask >> last.lane() & 1)) fail(last, "a shuffle's mask lacks its caller");
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (!(last.mask >> lane & 1)) continue;
    if (warp[lane].state == State::exited) fail(last, "a shuffle's mask has an exited lane");
    if (warp[lane].state != State::at_shuffle || warp[lane].line != last.line) return;
    if (warp[lane].mask != last.mask) fail(last, "a shuffle's masks differ");
  }
  uint64_t values[kLanes];
  for (unsigned lane = 0; lane < kLanes; ++lane) values[lane] = warp[lane].value;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (!(last.mask >> lane & 1)) continue;
    const unsigned source = lane ^ warp[lane].lane_mask;
    if (source >= kLanes || !(last.mask >> source & 1)) {
      fail(warp[lane], "a shuffle reads a lane outside of its mask");
    }
    warp[lane].value = values[source];
    warp[lane].state = State::ready;
  }
}

// Lets the block go on from its barrier, where each of its threads has to be.
inline void pass_barrier() {
  Machine& m = machine();
  for (unsigned i = 0; i < m.block.x; ++i) {
    Thread& thread = m.threads[i];
    if (thread.state != State::at_barrier)
      fail(thread, "a barrier or shuffle is not reached by all");
    if (thread.line != m.threads[0].line) fail(thread, "threads wait at different barriers");
  }
  for (unsigned i = 0; i < m.block.x; ++i) m.threads[i].state = State::ready;
}

// Shared variables are this library's thread-local ones: its TLS block holds all of them, those of
// templates too, which a section attribute doesn't reach.
inline thread_local char some_shared_byte;

struct SharedMemory {
  char* begin;
  size_t size;
};

inline int find_shared_memory(dl_phdr_info* library, size_t, void* found) {
  const char* inside = &some_shared_byte;
  char* begin = static_cast<char*>(library->dlpi_tls_data);
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const auto& segment = library->dlpi_phdr[i];
    if (segment.p_type != PT_TLS || inside < begin || inside >= begin + segment.p_memsz) continue;
    *static_cast<SharedMemory*>(found) = {begin, segment.p_memsz};
    return 1;
  }
  return 0;
}

inline void poison_shared_memory() {
  static const SharedMemory memory = [] {
    SharedMemory found{};
    dl_iterate_phdr(find_shared_memory, &found);
    return found;
  }();
  std::memset(memory.begin, 0xff, memory.size);
}

inline std::vector<unsigned> in_order(unsigned size) {
  std::vector<unsigned> order(size);
  std::iota(order.begin(), order.end(), 0u);
  if (machine().seed == 1) std::reverse(order.begin(), order.end());
  return order;
}

// Seed 0 stands for ascending order, 1 for descending order, others for random ones.
inline void reorder(std::vector<unsigned>& order) {
  if (machine().seed > 1) std::shuffle(order.begin(), order.end(), machine().random);
}

inline void run_block(unsigned index) {
  Machine& m = machine();
  m.block_index.x = index;
  poison_shared_memory();
  for (unsigned i = 0; i < kMaxThreads; ++i) {
    Thread& thread = m.threads[i];
    thread.index.x = i;
    thread.state = i < m.block.x ? State::ready : State::exited;
    if (i < m.block.x) thread.fiber.restart(run_thread);
  }
  std::vector<unsigned> order = in_order(m.block.x);
  for (unsigned exited = 0; exited < m.block.x;) {
    reorder(order);
    bool progress = false;
    exited = 0;
    for (unsigned i : order) {
      Thread& thread = m.threads[i];
      if (thread.state == State::ready) {
        progress = true;
        m.running = &thread;
        thread.fiber.resume();
        if (!m.error.empty()) fail(thread, m.error);
        if (thread.state == State::at_shuffle) try_shuffle(thread);
      }
      exited += thread.state == State::exited;
    }
    if (!progress) pass_barrier();
  }
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  Machine& m = machine();
  if (block.x < 1 || block.x > kMaxThreads) throw std::runtime_error("no such size of a block");
  m.grid = grid;
  m.block = block;
  m.kernel = &kernel;
  m.error.clear();
  m.random.seed(m.seed);
  std::vector<unsigned> order = in_order(grid.x);
  reorder(order);
  for (unsigned index : order) run_block(index);
}

}  // namespace simt

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define threadIdx (simt::machine().running->index)
#define blockIdx (simt::machine().block_index)
#define blockDim (simt::machine().block)
#define __syncthreads() simt::wait(simt::State::at_barrier, __LINE__)
#define __shfl_xor_sync(mask, value, lane_mask) simt::shuffle_xor(mask, value, lane_mask, __LINE__)

template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
