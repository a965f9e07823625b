#include "emulator.h"

#include <cstring>
#include <map>
#include <memory>
#include <utility>

#include "fiber.h"

#ifdef FASTLOSS_UNDER_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#else
// Happens-before, as ThreadSanitizer takes it: an acquire sees what came before the releases of the same address.
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
static void __tsan_ignore_thread_begin() {}
static void __tsan_ignore_thread_end() {}
#endif

namespace fastloss::emulator {

Index thread_index, block_index, block_size, grid_size;
unsigned char* shared;
int current_device = 0;
bool only_ends = false;

namespace {

constexpr int kLanes = 32;
constexpr int kPoison = 0xff;  // nan as a float, -1 as an integer
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kCanary = 0;  // it would hide an overrun
#else
constexpr size_t kCanary = 256;
#endif

enum class Wait : uint8_t { ready, shuffle, warp_barrier, block_barrier, cluster_wait, left };
const char* name_of(Wait wait) {
  switch (wait) {
    case Wait::ready: return "ready";
    case Wait::shuffle: return "at a shuffle";
    case Wait::warp_barrier: return "at a warp barrier";
    case Wait::block_barrier: return "at a block barrier";
    case Wait::cluster_wait: return "waiting for the cluster";
    case Wait::left: return "has left the kernel";
  }
  return "";
}

struct Block;

struct Thread {
  Block* block;
  unsigned index;
  std::unique_ptr<Fiber> fiber;
  Wait wait = Wait::ready;
  Site site{"", 0};                  // where it waits
  uint64_t given = 0, received = 0;  // in a shuffle
  bool arrived = false;              // at the cluster's barrier, not yet waited
  unsigned phase = 0;                // which it arrived in
  bool volatile_writes = false;      // since its last fence
  bool announced = false;            // by a volatile write
  char* last_fence = nullptr;
  std::vector<char*> seen_fences;  // by its atomics
};

// Threads that come together at one place.
struct Gathering {
  int size = 0, arrived = 0;
  unsigned phase = 0;  // how often they were complete
  Site site{"", 0};
  Wait kind = Wait::ready;
  char happened[2];  // addresses for happens-before; two, so that a late waiter does not see the next arrivals
};

struct Warp {
  Thread* lanes;
  uint64_t priority;
  int ready = kLanes;
  Gathering gathering;
};

struct Cluster;

struct Block {
  Cluster* cluster;
  unsigned index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  Gathering gathering;
  int alive;
  char end;

  Warp& warp_of(const Thread& t) { return warps[t.index / kLanes]; }
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Gathering gathering;
  int alive;
  char end;
};

// The emulator's own memory, allocated while a thread runs, is none of its doing.
struct Unseen {
  Unseen() { __tsan_ignore_thread_begin(); }
  ~Unseen() { __tsan_ignore_thread_end(); }
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t operator()() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  uint64_t below(uint64_t n) { return (*this)() % n; }
  bool one_in(uint64_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

uint64_t seed;
std::string error;
std::vector<LaunchShape> launched;
std::vector<std::unique_ptr<Fiber>> idle_fibers;

std::string place(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

class Launch {
 public:
  Launch(const LaunchShape& shape, Body body, const void* argument)
      : shape_(shape), body_(body), argument_(argument), random_(seed) {}
  Status run();

  // Called by the running thread.
  void give_way_by_chance();
  void wait(Wait kind, Site site);
  void wake(Thread& t, Wait kind);
  bool arrive(Gathering& gathering, Wait kind, Site site);
  [[noreturn]] void fail(const std::string& what);
  int shared_bytes() const { return shape_.shared; }

  Thread* running = nullptr;
  std::vector<std::unique_ptr<char>> fences;
  std::map<const void*, std::vector<char*>> fences_at;  // that an atomic at this address lets be seen

 private:
  void start_cluster(int64_t first_block);
  void retire(Cluster& cluster);
  Warp* choose_warp();
  void run_lanes(Warp& warp);
  void leave(Thread& t);
  std::string describe_deadlock() const;
  static void thread_main(void* thread);

  const LaunchShape shape_;
  const Body body_;
  const void* const argument_;
  Random random_;
  std::vector<std::unique_ptr<Cluster>> clusters_;  // in flight
  bool failed_ = false;
  char begin_;  // an address for happens-before
};

Launch* current = nullptr;

// ---------------------------------------------------------------------------------------------- blocks come and go

void Launch::start_cluster(int64_t first_block) {
  auto cluster = std::make_unique<Cluster>();
  cluster->alive = shape_.cluster;
  cluster->gathering.size = shape_.cluster * shape_.block;
  for (int rank = 0; rank < shape_.cluster; ++rank) {
    auto block = std::make_unique<Block>();
    block->cluster = cluster.get();
    block->index = static_cast<unsigned>(first_block + rank);
    block->alive = block->gathering.size = shape_.block;
    block->shared.reset(new unsigned char[shape_.shared + kCanary]);
    std::memset(block->shared.get(), kPoison, shape_.shared + kCanary);
    block->threads.resize(shape_.block);
    block->warps.resize(shape_.block / kLanes);
    for (size_t w = 0; w < block->warps.size(); ++w) {
      block->warps[w].lanes = &block->threads[w * kLanes];
      block->warps[w].priority = random_();
      block->warps[w].gathering.size = kLanes;
    }
    for (int i = 0; i < shape_.block; ++i) {
      Thread& t = block->threads[i];
      t.block = block.get();
      t.index = static_cast<unsigned>(i);
      if (idle_fibers.empty()) idle_fibers.push_back(std::make_unique<Fiber>());
      t.fiber = std::move(idle_fibers.back());
      idle_fibers.pop_back();
      t.fiber->start(&thread_main, &t);
    }
    cluster->blocks.push_back(std::move(block));
  }
  clusters_.push_back(std::move(cluster));
}

void Launch::thread_main(void* thread) {
  __tsan_acquire(&current->begin_);
  current->body_(current->argument_);
  current->leave(*static_cast<Thread*>(thread));
}

void Launch::leave(Thread& t) {
  Block& block = *t.block;
  if (t.arrived) fail("leaves between cluster_arrive and cluster_wait");
  t.wait = Wait::left;
  --block.warp_of(t).ready;
  __tsan_release(&block.end);
  if (--block.alive == 0) {  // the block's last thread takes the shared memory away
    __tsan_acquire(&block.end);
    for (size_t i = 0; i < kCanary; ++i)
      if (block.shared[shape_.shared + i] != kPoison) fail("its block wrote past the end of the shared memory");
    std::memset(block.shared.get(), kPoison, shape_.shared);
    if (--block.cluster->alive == 0) __tsan_acquire(&block.cluster->end);
    __tsan_release(&block.cluster->end);
  }
  Fiber::pause();
}

void Launch::retire(Cluster& cluster) {
  __tsan_acquire(&cluster.end);
  for (auto& block : cluster.blocks)
    for (Thread& t : block->threads) idle_fibers.push_back(std::move(t.fiber));
}

// ------------------------------------------------------------------------------------------------------- schedule

Warp* Launch::choose_warp() {
  Warp* best = nullptr;
  for (auto& cluster : clusters_)
    for (auto& block : cluster->blocks)
      for (Warp& warp : block->warps)
        if (warp.ready > 0 && (!best || warp.priority > best->priority)) best = &warp;
  if (best && random_.one_in(16)) best->priority = random_();
  return best;
}

// Every lane that is ready runs until it waits or gives way; in a random order.
void Launch::run_lanes(Warp& warp) {
  const unsigned first = unsigned(random_()), step = unsigned(random_()) | 1;
  for (unsigned i = 0; i < kLanes && !failed_; ++i) {
    Thread& t = warp.lanes[(first + i * step) % kLanes];
    if (t.wait != Wait::ready) continue;
    running = &t;
    thread_index.x = t.index;
    block_index.x = t.block->index;
    shared = t.block->shared.get();
    t.fiber->resume();
  }
}

Status Launch::run() {
  block_size.x = static_cast<unsigned>(shape_.block);
  grid_size.x = static_cast<unsigned>(shape_.grid);
  std::vector<int64_t> to_start;
  const int64_t last = shape_.grid - shape_.cluster, step = only_ends && last > 0 ? last : shape_.cluster;
  for (int64_t i = 0; i < shape_.grid; i += step) to_start.push_back(i);
  for (size_t i = to_start.size(); i > 1; --i) std::swap(to_start[i - 1], to_start[random_.below(i)]);
#ifdef FASTLOSS_UNDER_TSAN
  // All at once: a block that starts after another has been retired would happen after it.
  const size_t in_flight = to_start.size();
#else
  const size_t in_flight = 1 + random_.below(4);
#endif
  while (!failed_) {
    for (size_t i = clusters_.size(); i-- > 0;) {
      if (clusters_[i]->alive > 0) continue;
      retire(*clusters_[i]);
      clusters_.erase(clusters_.begin() + int64_t(i));
    }
    while (!to_start.empty() && clusters_.size() < in_flight) {
      start_cluster(to_start.back());
      to_start.pop_back();
      __tsan_release(&begin_);
    }
    if (clusters_.empty()) break;
    if (Warp* warp = choose_warp()) {
      run_lanes(*warp);
    } else {
      error = describe_deadlock();
      failed_ = true;
    }
  }
  for (auto& cluster : clusters_) retire(*cluster);
  return {failed_ ? Status::cuda_error : Status::ok};
}

// ------------------------------------------------------------------------------------- what the running thread does

void Launch::give_way_by_chance() {
  if (random_.one_in(8)) Fiber::pause();
}

void Launch::wait(Wait kind, Site site) {
  running->wait = kind;
  running->site = site;
  --running->block->warp_of(*running).ready;
  Fiber::pause();
}

void Launch::wake(Thread& t, Wait kind) {
  if (t.wait != kind) return;
  t.wait = Wait::ready;
  ++t.block->warp_of(t).ready;
}

// True for the last thread to come, which then wakes the others; they have to wait.
bool Launch::arrive(Gathering& g, Wait kind, Site site) {
  if (g.arrived == 0) {
    g.kind = kind;
    g.site = site;
  } else if (g.kind != kind || g.site.line != site.line) {
    fail(std::string(name_of(kind)) + ", " + place(site) + ", while others are " + name_of(g.kind) + ", " +
         place(g.site));
  }
  if (++g.arrived < g.size) return false;
  g.arrived = 0;
  ++g.phase;
  return true;
}

void Launch::fail(const std::string& what) {
  const Unseen unseen;
  error =
      "thread " + std::to_string(running->index) + " of block " + std::to_string(running->block->index) + ": " + what;
  failed_ = true;
  for (;;) Fiber::pause();  // for good
}

// Nobody can run, not all have left: says where the threads of the first such block are.
std::string Launch::describe_deadlock() const {
  std::string text = "threads wait for others that do not come";
  for (auto& cluster : clusters_)
    for (auto& block : cluster->blocks) {
      if (block->alive == 0) continue;
      text += "; block " + std::to_string(block->index) + ":";
      const std::vector<Thread>& threads = block->threads;
      for (size_t i = 0, j; i < threads.size(); i = j) {
        const Thread& t = threads[i];
        for (j = i + 1; j < threads.size(); ++j)
          if (threads[j].wait != t.wait || threads[j].site.line != t.site.line) break;
        text += " [" + std::to_string(i) + "-" + std::to_string(j - 1) + "] " + name_of(t.wait);
        if (t.wait != Wait::left) text += ", " + place(t.site);
      }
      return text;
    }
  return text;
}

}  // namespace

// -------------------------------------------------------------------------------------------------------- the seam

uint64_t shuffle_xor(unsigned mask, uint64_t bits, int lane_mask, Site site) {
  Thread& t = *current->running;
  if (mask != 0xffffffffu) current->fail("a shuffle of part of a warp, " + place(site));
  Warp& warp = t.block->warp_of(t);
  t.given = bits;
  if (current->arrive(warp.gathering, Wait::shuffle, site)) {
    for (int lane = 0; lane < kLanes; ++lane) {
      warp.lanes[lane].received = warp.lanes[lane ^ lane_mask].given;
      current->wake(warp.lanes[lane], Wait::shuffle);
    }
  } else {
    current->wait(Wait::shuffle, site);
  }
  return t.received;
}

void warp_barrier(Site site) {
  Warp& warp = current->running->block->warp_of(*current->running);
  char* happened = warp.gathering.happened + warp.gathering.phase % 2;
  __tsan_release(happened);
  if (current->arrive(warp.gathering, Wait::warp_barrier, site))
    for (int lane = 0; lane < kLanes; ++lane) current->wake(warp.lanes[lane], Wait::warp_barrier);
  else
    current->wait(Wait::warp_barrier, site);
  __tsan_acquire(happened);
}

void block_barrier(Site site) {
  Block& block = *current->running->block;
  char* happened = block.gathering.happened + block.gathering.phase % 2;
  __tsan_release(happened);
  if (current->arrive(block.gathering, Wait::block_barrier, site))
    for (Thread& t : block.threads) current->wake(t, Wait::block_barrier);
  else
    current->wait(Wait::block_barrier, site);
  __tsan_acquire(happened);
}

void cluster_arrive(Site site) {
  Thread& t = *current->running;
  Cluster& cluster = *t.block->cluster;
  if (t.arrived) current->fail("arrives twice at the cluster's barrier, " + place(site));
  t.arrived = true;
  t.phase = cluster.gathering.phase;
  __tsan_release(cluster.gathering.happened + t.phase % 2);
  if (current->arrive(cluster.gathering, Wait::cluster_wait, site))
    for (auto& block : cluster.blocks)
      for (Thread& other : block->threads) current->wake(other, Wait::cluster_wait);
  current->give_way_by_chance();
}

void cluster_wait(Site site) {
  Thread& t = *current->running;
  Cluster& cluster = *t.block->cluster;
  if (!t.arrived) current->fail("waits for the cluster without having arrived, " + place(site));
  if (cluster.gathering.phase == t.phase) current->wait(Wait::cluster_wait, site);
  t.arrived = false;
  __tsan_acquire(cluster.gathering.happened + t.phase % 2);
}

const unsigned char* cluster_map(const void* p, int rank, Site site) {
  const Block& block = *current->running->block;
  if (rank < 0 || rank >= int(block.cluster->blocks.size()))
    current->fail("maps the shared memory of a block outside the cluster, " + place(site));
  current->give_way_by_chance();
  const Block& peer = *block.cluster->blocks[size_t(rank)];
  if (peer.alive == 0) current->fail("reads the shared memory of a block that has left, " + place(site));
  return peer.shared.get() + (static_cast<const unsigned char*>(p) - block.shared.get());
}

// A fence of one thread and a later fence of another are ordered when the other saw, between them, an atomic that the
// first one made after its own. Each fence is an address for happens-before; an atomic takes along the addresses that
// its location knows, and leaves there the fence before it.
void fence() {
  Thread& t = *current->running;
  for (char* seen : t.seen_fences) __tsan_acquire(seen);
  t.seen_fences.clear();
  t.volatile_writes = false;
  {
    const Unseen unseen;
    current->fences.push_back(std::make_unique<char>());
  }
  t.last_fence = current->fences.back().get();
  __tsan_release(t.last_fence);
  current->give_way_by_chance();
}

void before_atomic(const void* location) {
  current->give_way_by_chance();
  const Unseen unseen;
  Thread& t = *current->running;
  std::vector<char*>& known = current->fences_at[location];
  t.seen_fences.insert(t.seen_fences.end(), known.begin(), known.end());
  if (t.last_fence) known.push_back(t.last_fence);
}

// Volatile accesses are relaxed atomics in CUDA. One to where there have been atomic operations announces something:
// what was written before it has to be ordered by a fence, and nothing comes after it. What is announced is data like
// any other, which only one thread may write. True for such data.
[[maybe_unused]] static bool volatile_write(const void* p) {
  if (!current) return false;  // the host's own
  Thread& t = *current->running;
  const bool announces = current->fences_at.count(p) > 0;
  if (t.volatile_writes && announces) current->fail("announces what no fence has ordered");
  if (t.announced && !announces) current->fail("writes what has been announced before");
  t.volatile_writes = true;
  t.announced |= announces;
  return !announces;
}

void access_vector(const void* p, int bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    current->fail("a misaligned " + std::to_string(8 * bytes) + "-bit access, " + place(site));
  current->give_way_by_chance();
}

void access_stream(const void* p, int bytes, Site site) {
  const auto* at = static_cast<const unsigned char*>(p);
  for (auto& block : current->running->block->cluster->blocks)
    if (at >= block->shared.get() && at < block->shared.get() + current->shared_bytes())
      current->fail("a streaming access to shared memory, " + place(site));
  access_vector(p, bytes, site);
}

Status run(const LaunchShape& shape, Body body, const void* argument) {
  if (shape.grid <= 0) return {};
  launched.push_back(shape);
  const DeviceProperties limits = device(current_device);
  if (shape.grid > INT32_MAX || shape.block % kLanes != 0 || shape.block < kLanes || shape.block > 1024 ||
      shape.grid % shape.cluster != 0 || shape.cluster < 1 || shape.cluster > limits.max_cluster ||
      shape.shared > limits.shared_per_block) {
    error = "no such launch: " + std::to_string(shape.grid) + " blocks of " + std::to_string(shape.block) +
            " threads in clusters of " + std::to_string(shape.cluster) + " with " + std::to_string(shape.shared) +
            " bytes";
    return {Status::cuda_error};
  }
  Launch launch(shape, body, argument);
  current = &launch;
  const Status status = launch.run();
  current = nullptr;
  return status;
}

// ------------------------------------------------------------------------------------------------------- for tests

void set_seed(uint64_t s) {
  seed = s;
  launched.clear();
}
const std::string& last_error() { return error; }
const std::vector<LaunchShape>& launches() { return launched; }

DeviceProperties device(int index) {
  DeviceProperties d;
  if (index < 0 || index >= kDevices) return d;
  constexpr int sm[] = {80, 90, 120, 100}, cluster[] = {1, 16, 8, 16},
                shared_bytes[] = {166912, 232448, 101376, 232448};
  d.sm = sm[index];
  d.max_cluster = cluster[index];
  d.multiprocessors = index == 3 ? 1 << 20 : 1;
  d.shared_per_block = shared_bytes[index];
  return d;
}

}  // namespace fastloss::emulator

#ifdef FASTLOSS_UNDER_TSAN
// What the compiler calls at volatile accesses (--param=tsan-distinguish-volatile).
extern "C" {
void __tsan_volatile_read4(void*) {}
void __tsan_volatile_read8(void*) {}
void __tsan_volatile_write1(void*) {}
void __tsan_write4(void*);
void __tsan_write8(void*);
void __tsan_volatile_write4(void* p) {
  if (fastloss::emulator::volatile_write(p)) __tsan_write4(p);
}
void __tsan_volatile_write8(void* p) {
  if (fastloss::emulator::volatile_write(p)) __tsan_write8(p);
}
}
#endif
