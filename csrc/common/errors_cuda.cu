#include <atomic>
#include <mutex>

#include "errors_cuda.h"
#include "primitives.cuh"

namespace fastloss {

namespace {

struct Record {
  std::mutex mutex;
  std::atomic<volatile BadTargetRecord*> host{nullptr};
  BadTargetRecord* device = nullptr;
};
Record& record() {
  static Record* r = new Record;  // outlives every caller, at exit too
  return *r;
}

}  // namespace

BadTargetRecord* bad_target_record_cuda(Status* status) {
  *status = {};
  Record& r = record();
  if (r.host.load(std::memory_order_acquire)) return r.device;
  std::lock_guard<std::mutex> lock(r.mutex);
  if (r.host.load(std::memory_order_relaxed)) return r.device;
  void* host = nullptr;
  void* device = nullptr;
  *status = allocate_mapped(sizeof(BadTargetRecord), &host, &device);
  if (status->code != Status::ok) return nullptr;
  r.device = static_cast<BadTargetRecord*>(device);
  r.host.store(static_cast<volatile BadTargetRecord*>(host), std::memory_order_release);
  return r.device;
}

bool bad_target_peek_cuda() {
  volatile BadTargetRecord* p = record().host.load(std::memory_order_acquire);
  return p && p->state == 2;
}

Status bad_target_take_cuda(int32_t* what) {
  Record& r = record();
  std::lock_guard<std::mutex> lock(r.mutex);
  volatile BadTargetRecord* p = r.host.load(std::memory_order_acquire);
  if (!p || p->state != 2) return {};
  std::atomic_thread_fence(std::memory_order_acquire);
  Status found{Status::bad_target, p->row, p->value};
  if (what) *what = p->what;
  std::atomic_thread_fence(std::memory_order_release);
  p->state = 0;
  return found;
}

}  // namespace fastloss
