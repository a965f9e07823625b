// Checks and times the CUDA kernels by themselves, without torch: every launch policy against a float64 reference on
// the host, then throughput as fewest bytes / time beside a device-to-device copy measured in the same run.
//
//   cd csrc && for f in ../bench/cuda/probe.cu common/*.cu rowwise/*_cuda*.cu; do echo $f; done |
//     xargs -P 8 -I{} sh -c 'nvcc -std=c++17 -O3 --expt-relaxed-constexpr -arch=native -I. -c {} -o /tmp/$(basename
//     {}).o' && nvcc -arch=native /tmp/*.cu.o -o probe && ./probe [check|few|time|all] [largest case to check, in
//     elements]
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/convert.cuh"
#include "common/errors_cuda.h"
#include "common/scale_grad_cuda.h"
#include "rowwise/cross_entropy_cuda.h"
#include "rowwise/cross_entropy_policy.h"
#include "rowwise/row_loss_cuda.h"

using namespace fastloss;

#define OK(x)                                                                              \
  do {                                                                                     \
    cudaError_t e_ = (x);                                                                  \
    if (e_ != cudaSuccess) {                                                               \
      std::printf("FATAL %s:%d %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(e_)); \
      std::exit(2);                                                                        \
    }                                                                                      \
  } while (0)

static int failures = 0, checks = 0;

static double load_host(const void* p, DType t, int64_t i) {
  switch (t) {
    case DType::f32: return static_cast<const float*>(p)[i];
    case DType::f64: return static_cast<const double*>(p)[i];
    case DType::f16: return __half2float(static_cast<const __half*>(p)[i]);
    case DType::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
  }
  return 0;
}
static void store_host(void* p, DType t, int64_t i, double v) {
  switch (t) {
    case DType::f32: static_cast<float*>(p)[i] = float(v); break;
    case DType::f64: static_cast<double*>(p)[i] = v; break;
    case DType::f16: static_cast<__half*>(p)[i] = __float2half_rn(float(v)); break;
    case DType::bf16: static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(float(v)); break;
  }
}
static const char* name_of(DType t) {
  return t == DType::f32 ? "f32" : t == DType::f64 ? "f64" : t == DType::f16 ? "f16" : "bf16";
}

// Device memory with a poisoned margin on both sides and a host mirror.
struct Buffer {
  static constexpr int64_t kMargin = 256;
  std::vector<unsigned char> host;
  unsigned char* device = nullptr;
  int64_t bytes, offset;
  explicit Buffer(int64_t bytes_, int64_t offset_ = 0) : host(bytes_), bytes(bytes_), offset(offset_) {
    OK(cudaMalloc(&device, 2 * kMargin + offset + bytes));
    poison();
  }
  ~Buffer() { cudaFree(device); }
  Buffer(const Buffer&) = delete;
  void* data() { return device + kMargin + offset; }
  void poison() { OK(cudaMemset(device, 0xff, 2 * kMargin + offset + bytes)); }
  void upload() { OK(cudaMemcpy(data(), host.data(), bytes, cudaMemcpyHostToDevice)); }
  void download() { OK(cudaMemcpy(host.data(), data(), bytes, cudaMemcpyDeviceToHost)); }
  bool margins_intact() {
    std::vector<unsigned char> all(2 * kMargin + offset + bytes);
    OK(cudaMemcpy(all.data(), device, all.size(), cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < kMargin + offset; ++i)
      if (all[i] != 0xff) return false;
    for (int64_t i = kMargin + offset + bytes; i < int64_t(all.size()); ++i)
      if (all[i] != 0xff) return false;
    return true;
  }
};

struct Case {
  std::string what;
  int64_t outer = 4, classes = 10, inner = 1;
  DType type = DType::f32;
  Strides strides{-1, 1, 1};  // outer < 0: contiguous with the class axis last (inner == 1) or in the middle
  Strides grad_strides{-1, 1, 1};
  int64_t offset = 0, grad_offset = -1;  // elements; grad as logits
  bool soft = false;
  DType prob = DType::f32;
  IndexType index = IndexType::i64;
  bool weight = false, sample = false, argmax = false, in_place = false, zero_times_inf = false, all_zero = false;
  bool special = false, ignore_some = true, all_ignored = false, bad = false, target_grad = false, graph = false;
  double smoothing = 0, z_loss = 0, softcap = 0, scale = 1, spread = 4, shift = 0;
  Reduction reduction = Reduction::mean;
};

static int64_t span_of(const Strides& s, int64_t o, int64_t c, int64_t i) {
  return o && c && i ? (o - 1) * s.outer + (c - 1) * s.cls + (i - 1) * s.inner + 1 : 0;
}

struct Reference {
  std::vector<double> loss_rows, lse, grad, grad_target;  // grads [rows][classes], for grad_output g
  std::vector<int64_t> argmax;
  double loss = 0, accuracy = 0, d = 0, dn = 0, counted = 0;
};

static double product_of(double q, double d, bool zero) { return zero && q == 0 ? 0 : q * d; }

// The definition in cross_entropy.h, row by row in float64. x, p: [rows][classes]; g: grad_output per row.
static Reference reference_of(const Case& k, const std::vector<double>& x, const std::vector<double>& p,
                              const std::vector<int64_t>& t, const std::vector<double>& w, const std::vector<double>& s,
                              const std::vector<double>& g) {
  const int64_t rows = k.outer * k.inner, n = k.classes;
  Reference r;
  r.loss_rows.resize(rows);
  r.lse.resize(rows);
  r.argmax.resize(rows);
  r.grad.assign(rows * n, 0);
  r.grad_target.assign(k.soft ? rows * n : 0, 0);
  auto weight = [&](int64_t c) { return w.empty() ? 1.0 : w[c]; };
  auto sample = [&](int64_t row) { return s.empty() ? 1.0 : s[row]; };
  auto counts = [&](int64_t row) { return k.soft || (t[row] != -100 && t[row] >= 0 && t[row] < n); };
  for (int64_t row = 0; row < rows; ++row)
    if (counts(row)) {
      r.counted += 1;
      r.dn += sample(row);
      r.d += sample(row) * (k.soft ? 1 : weight(t[row]));
    }
  double weights = 0, nll_sum = 0, z_sum = 0, correct = 0;
  for (int64_t c = 0; c < n; ++c) weights += weight(c);
  std::vector<double> nll(rows), z2(rows);
  std::vector<int> hit(rows);
  auto work = [&](int64_t first, int64_t step) {
    std::vector<double> z(n), slope(n), sm(n);
    for (int64_t row = first; row < rows; row += step) {
      double max = -INFINITY, top = 0;
      bool has_nan = false;
      int64_t best = -1, best_p = -1;
      double top_p = 0;
      for (int64_t c = 0; c < n; ++c) {
        double v = x[row * n + c] * k.scale;
        slope[c] = k.scale;
        if (k.softcap > 0) {
          double th = std::tanh(v / k.softcap);
          v = k.softcap * th;
          slope[c] = k.scale * (1 - th * th);
        }
        z[c] = v;
        if (best < 0 || (top == top && (v > top || v != v))) best = c, top = v;
        if (k.soft) {
          double q = p[row * n + c];
          if (best_p < 0 || q > top_p) best_p = c, top_p = q;
        }
        has_nan |= v != v;
        if (v > max) max = v;
      }
      r.argmax[row] = best < 0 ? 0 : best;
      double sum = 0;
      for (int64_t c = 0; c < n; ++c) sum += sm[c] = std::exp(z[c] - (max == -INFINITY ? 0 : max));
      if (has_nan || max == INFINITY || max == -INFINITY) sum = NAN;
      const double log_sum = std::log(sum), lse = max + log_sum;
      r.lse[row] = has_nan ? NAN : std::isinf(max) ? max : lse;
      for (int64_t c = 0; c < n; ++c) sm[c] /= sum;
      double dot = 0, mass = 0, row_nll = 0;
      const double e = k.smoothing;
      if (k.soft) {
        for (int64_t c = 0; c < n; ++c) {
          double q = weight(c) * ((1 - e) * p[row * n + c] + e / n);
          dot += product_of(q, z[c] - max, k.zero_times_inf);
          mass += q;
        }
        row_nll = mass * log_sum - dot;
      } else if (counts(row)) {
        row_nll = (1 - e) * product_of(weight(t[row]), log_sum - (z[t[row]] - max), k.zero_times_inf);
        if (e > 0) {
          for (int64_t c = 0; c < n; ++c) dot += product_of(weight(c), z[c] - max, k.zero_times_inf);
          row_nll += e / n * (weights * log_sum - dot);
        }
      }
      const bool bad = !k.soft && t[row] != -100 && !counts(row);
      nll[row] = counts(row) ? sample(row) * row_nll : bad ? NAN : 0;
      z2[row] = counts(row) && k.z_loss != 0 ? sample(row) * k.z_loss * lse * lse : 0;
      hit[row] = counts(row) && r.argmax[row] == (k.soft ? best_p : t[row]);
      const bool mean = k.reduction == Reduction::mean;
      const double u = counts(row) ? g[row] * sample(row) / (mean ? r.d : 1) : 0;
      const double uz = counts(row) ? g[row] * sample(row) / (mean ? r.dn : 1) : 0;
      for (int64_t c = 0; c < n; ++c) {
        double v = 0;
        const double zl = k.z_loss != 0 ? uz * 2 * k.z_loss * lse : 0;
        if (k.soft) {
          const double q = weight(c) * ((1 - e) * p[row * n + c] + e / n);
          v = (u * mass + zl) * sm[c] - u * q;
          r.grad_target[row * n + c] = u * (1 - e) * weight(c) * (log_sum - (z[c] - max));
        } else {
          const double wt = counts(row) ? weight(t[row]) : 0;
          v = (u * (1 - e) * wt + u * e / n * weights + zl) * sm[c] - u * e / n * weight(c);
          if (counts(row) && c == t[row]) v -= u * (1 - e) * wt;
        }
        r.grad[row * n + c] = v * slope[c];
      }
      r.loss_rows[row] = nll[row] + z2[row];
    }
  };
  std::vector<std::thread> pool;
  for (int i = 0; i < 8; ++i) pool.emplace_back(work, i, 8);
  for (auto& th : pool) th.join();
  for (int64_t row = 0; row < rows; ++row) {
    nll_sum += nll[row];
    z_sum += z2[row];
    correct += hit[row];
  }
  const bool nothing = k.all_zero && r.counted == 0;
  if (k.reduction == Reduction::mean) {
    r.loss = nothing ? 0 : r.d == 0 ? NAN : nll_sum / r.d;
    if (k.z_loss != 0) r.loss += nothing ? 0 : z_sum / r.dn;
  } else {
    r.loss = nll_sum + z_sum;
  }
  r.accuracy = nothing ? 0 : correct / r.counted;
  return r;
}

// Worst |got - want| over tolerance; infinity when one is nan and the other is not.
struct Worst {
  double ratio = 0, got = 0, want = 0;
  int64_t at = -1;
  void see(double g, double w, double tolerance, int64_t i) {
    double e;
    if (g != g || w != w)
      e = (g != g) == (w != w) ? 0 : INFINITY;
    else if (std::isinf(w) || std::isinf(g))
      e = g == w ? 0 : INFINITY;
    else
      e = std::fabs(g - w) / tolerance;
    if (e > ratio) ratio = e, got = g, want = w, at = i;
  }
};

static void report(const Case& k, const char* quantity, const Worst& w) {
  ++checks;
  if (w.ratio <= 1) return;
  ++failures;
  if (failures < 200)
    std::printf("FAIL %-26s %-4s o%lld c%lld i%lld %-12s err/tol %.3g  got %.9g want %.9g at %lld (row %lld, c %lld)\n",
                k.what.c_str(), name_of(k.type), (long long)k.outer, (long long)k.classes, (long long)k.inner, quantity,
                w.ratio, w.got, w.want, (long long)w.at, (long long)(w.at / std::max<int64_t>(1, k.classes)),
                (long long)(w.at % std::max<int64_t>(1, k.classes)));
}

static double worst_ratio = 0;
static int64_t largest_case = INT64_MAX;  // elements; the second argument

static void check(Case k) {
  static std::mt19937_64 rng(7);
  const int64_t rows = k.outer * k.inner, n = k.classes;
  if (rows * n > largest_case) return;
  if (k.strides.outer < 0) k.strides = k.inner == 1 ? Strides{n, 1, 0} : Strides{n * k.inner, k.inner, 1};
  if (k.grad_strides.outer < 0) k.grad_strides = k.strides;
  if (k.grad_offset < 0) k.grad_offset = k.offset;
  if (k.in_place) k.grad_strides = k.strides, k.grad_offset = k.offset;
  const DType accum = accum_of(k.type), loss_type = k.type;
  const int64_t esize = size_of(k.type), asize = size_of(accum);
  const Strides ps = k.inner == 1 ? Strides{n, 1, 0} : Strides{n * k.inner, k.inner, 1};
  auto at = [&](const Strides& s, int64_t row, int64_t c) {
    return row / k.inner * s.outer + row % k.inner * s.inner + c * s.cls;
  };
  Buffer logits(span_of(k.strides, k.outer, n, k.inner) * esize, k.offset * esize);
  Buffer grad(span_of(k.grad_strides, k.outer, n, k.inner) * esize, k.grad_offset * esize);
  Buffer prob(k.soft ? rows * n * size_of(k.prob) : 0), grad_prob(prob.bytes);
  const int64_t isizes[] = {8, 4, 2, 1, 1, 2, 4, 8};
  Buffer target(k.soft ? 0 : rows * isizes[int(k.index)]), weight(k.weight ? n * asize : 0),
      sample(k.sample ? rows * asize : 0);
  Buffer loss(std::max<int64_t>(1, k.reduction == Reduction::none ? rows : 1) * size_of(loss_type));
  Buffer lse(rows * asize), argmax(rows * 8), accuracy(4), upstream(std::max<int64_t>(rows, 1) * size_of(loss_type));

  std::normal_distribution<double> normal(0, k.spread);
  std::uniform_real_distribution<double> uniform(0, 1);
  for (auto& b : logits.host) b = 0xff;
  std::vector<double> x(rows * n), p(k.soft ? rows * n : 0), w, s;
  std::vector<int64_t> t(rows, 0);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < n; ++c) {
      double v = normal(rng) + k.shift;
      if (k.special) {
        const int kind = int(row % 9);
        if (kind == 1 && c < n - n / 3) v = -INFINITY;
        if (kind == 2) v = -INFINITY;
        if (kind == 3 && c == n / 2) v = INFINITY;
        if (kind == 4 && c == n - 1) v = NAN;
        if (kind == 5 && c == 0) v = -INFINITY;
        if (kind == 6 && c >= n / 3) v = -INFINITY;
        if (kind == 7) v = NAN;
      }
      store_host(logits.host.data(), k.type, at(k.strides, row, c), v);
      x[row * n + c] = load_host(logits.host.data(), k.type, at(k.strides, row, c));
    }
  if (k.soft) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < n; ++c) {
        store_host(prob.host.data(), k.prob, at(ps, row, c),
                   (c + row) % 3 ? uniform(rng) / std::max<int64_t>(1, n) : 0);
        p[row * n + c] = load_host(prob.host.data(), k.prob, at(ps, row, c));
      }
  } else {
    for (int64_t row = 0; row < rows; ++row) {
      t[row] = n ? int64_t(rng() % uint64_t(n)) : 0;
      if (k.index == IndexType::i8 || k.index == IndexType::u8) t[row] %= 100;
      if (k.special && row % 9 == 5 && row % 2) t[row] = 0;                          // -inf at the target
      if (k.ignore_some && k.index <= IndexType::i8 && row % 5 == 3) t[row] = -100;  // falls on every special row too
      if (k.all_ignored) t[row] = -100;
      if (k.bad && row == rows / 2) t[row] = n + 5;
      if (k.bad && row == rows / 3) t[row] = -7;
      unsigned char* q = target.host.data() + row * isizes[int(k.index)];
      std::memcpy(q, &t[row], isizes[int(k.index)]);
    }
  }
  if (k.weight)
    for (int64_t c = 0; c < n; ++c) {
      store_host(weight.host.data(), accum, c, c % 7 == 6 ? 0 : 0.5 + uniform(rng));
      w.push_back(load_host(weight.host.data(), accum, c));
    }
  if (k.sample)
    for (int64_t r = 0; r < rows; ++r) {
      store_host(sample.host.data(), accum, r, 0.25 + uniform(rng));
      s.push_back(load_host(sample.host.data(), accum, r));
    }
  std::vector<double> ones(rows, 1), g(rows);
  const bool per_row = k.reduction == Reduction::none;
  for (int64_t r = 0; r < std::max<int64_t>(rows, 1); ++r)
    store_host(upstream.host.data(), loss_type, r, per_row ? 0.5 + uniform(rng) : 1.5);
  for (int64_t r = 0; r < rows; ++r) g[r] = load_host(upstream.host.data(), loss_type, per_row ? r : 0);
  for (Buffer* b : {&logits, &prob, &target, &weight, &sample, &upstream}) b->upload();

  CrossEntropyArgs a;
  a.outer = k.outer;
  a.classes = n;
  a.inner = k.inner;
  a.logits = logits.data();
  a.logits_type = k.type;
  a.logits_strides = k.strides;
  a.soft = k.soft;
  a.target = k.soft ? prob.data() : target.data();
  a.index_type = k.index;
  a.prob_type = k.prob;
  a.target_strides = ps;
  a.weight = k.weight ? weight.data() : nullptr;
  a.sample_weight = k.sample ? sample.data() : nullptr;
  a.label_smoothing = k.smoothing;
  a.z_loss = k.z_loss;
  a.softcap = k.softcap;
  a.logit_scale = k.scale;
  a.reduction = k.reduction;
  a.all_ignored_zero = k.all_zero;
  a.zero_times_inf = k.zero_times_inf;
  a.loss = loss.data();
  a.loss_type = loss_type;
  Buffer saved(a.saved_count() * asize);
  a.saved = saved.data();
  a.lse = lse.data();
  a.grad_strides = k.grad_strides;
  if (k.argmax) {
    a.argmax = static_cast<int64_t*>(argmax.data());
    a.accuracy = static_cast<float*>(accuracy.data());
  }
  CudaContext context;
  cudaStream_t stream;
  OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  context.stream = stream;
  auto run = [&](const char* name, auto f, const CrossEntropyArgs& args) {
    CudaContext c = context;
    c.workspace_bytes = cross_entropy_workspace_bytes_cuda(args, c);
    Buffer workspace(c.workspace_bytes);
    c.workspace = workspace.data();
    OK(cudaDeviceSynchronize());
    Status status;
    if (k.graph) {
      cudaGraph_t graph;
      cudaGraphExec_t exec;
      OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
      status = f(args, c);
      OK(cudaStreamEndCapture(stream, &graph));
      OK(cudaGraphInstantiate(&exec, graph, 0));
      for (int i = 0; i < 3; ++i) OK(cudaGraphLaunch(exec, stream));
      OK(cudaStreamSynchronize(stream));
      cudaGraphExecDestroy(exec);
      cudaGraphDestroy(graph);
    } else {
      status = f(args, c);
    }
    OK(cudaStreamSynchronize(stream));
    if (status.code != Status::ok) {
      ++failures;
      std::printf("FAIL %s %s: status %d value %lld (%s)\n", k.what.c_str(), name, status.code, (long long)status.value,
                  cudaGetErrorString(cudaError_t(status.value)));
    }
    if (!workspace.margins_intact()) ++failures, std::printf("FAIL %s %s: workspace overrun\n", k.what.c_str(), name);
  };

  const double unit = k.type == DType::f64 ? 1e-13 : 2e-6;  // relative, for quantities in the accumulation type
  const double half_ulp = k.type == DType::bf16 ? 0x1p-8 : k.type == DType::f16 ? 0x1p-11 : 0;
  const double absolute = k.type == DType::f16 ? 0x1p-25 : 0;
  auto check_grad = [&](const char* name, const std::vector<double>& gg, Buffer& out) {
    const Reference want = reference_of(k, x, p, t, w, s, gg);
    out.download();
    Worst worst;
    const double per = k.reduction == Reduction::mean ? std::max(1e-30, want.d) : 1;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < n; ++c) {
        const double v = want.grad[row * n + c];
        worst.see(load_host(out.host.data(), k.type, at(k.grad_strides, row, c)), v,
                  half_ulp * std::fabs(v) +
                      3 * unit * (std::fabs(v) + (k.smoothing > 0 || k.soft || k.z_loss > 0 ? 4 : 1) / per * 0.5) +
                      absolute,
                  row * n + c);
      }
    report(k, name, worst);
    worst_ratio = std::max(worst_ratio, worst.ratio);
    if (!out.margins_intact()) ++failures, std::printf("FAIL %s %s: wrote outside\n", k.what.c_str(), name);
  };

  // forward alone
  const Reference want = reference_of(k, x, p, t, w, s, ones);
  run("forward", cross_entropy_forward_cuda, a);
  loss.download();
  lse.download();
  Worst wl, ws;
  if (k.reduction == Reduction::none) {
    for (int64_t r = 0; r < rows; ++r) {
      const double v = want.loss_rows[r];
      wl.see(load_host(loss.host.data(), loss_type, r), v, (half_ulp + 2 * unit) * std::fabs(v) + 4 * unit, r);
    }
  } else {
    const double v = want.loss;
    wl.see(load_host(loss.host.data(), loss_type, 0), v, (half_ulp + 2 * unit) * std::fabs(v) + 4 * unit, 0);
  }
  report(k, "loss", wl);
  for (int64_t r = 0; r < rows && (k.argmax || !k.special); ++r)  // infinite sums are told apart by the arg-max
    ws.see(load_host(lse.host.data(), accum, r), want.lse[r], unit * (1 + std::fabs(want.lse[r])), r);
  report(k, "lse", ws);
  if (k.argmax) {
    Worst wa, wc;
    argmax.download();
    accuracy.download();
    for (int64_t r = 0; r < rows; ++r)
      wa.see(double(reinterpret_cast<int64_t*>(argmax.host.data())[r]), double(want.argmax[r]), 0.1, r);
    report(k, "argmax", wa);
    wc.see(*reinterpret_cast<float*>(accuracy.host.data()), want.accuracy, 1e-6, 0);
    report(k, "accuracy", wc);
  }
  const Status bad = bad_target_take_cuda();
  if ((bad.code == Status::bad_target) != k.bad)
    ++failures, std::printf("FAIL %s: bad target record\n", k.what.c_str());
  if (k.bad && !(t[bad.row] == bad.value && (bad.row == rows / 2 || bad.row == rows / 3)))
    ++failures, std::printf("FAIL %s: bad target says row %lld value %lld\n", k.what.c_str(), (long long)bad.row,
                            (long long)bad.value);

  // backward from saved
  CrossEntropyArgs b = a;
  b.grad_output = upstream.data();
  b.grad_output_per_row = per_row;
  b.grad = k.in_place ? logits.data() : grad.data();
  b.grad_strides = k.grad_strides;
  if (k.soft && k.target_grad) {
    b.grad_target = grad_prob.data();
    b.grad_target_strides = ps;
  }
  if (!(k.in_place && k.graph)) {
    run("backward", cross_entropy_backward_cuda, b);
    check_grad("backward", g, k.in_place ? logits : grad);
    if (b.grad_target) {
      const Reference wt = reference_of(k, x, p, t, w, s, g);
      grad_prob.download();
      Worst worst;
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = 0; c < n; ++c) {
          const double v = wt.grad_target[row * n + c];
          const double ulp = k.prob == DType::bf16 ? 0x1p-8 : k.prob == DType::f16 ? 0x1p-11 : 0;
          worst.see(load_host(grad_prob.host.data(), k.prob, at(ps, row, c)), v,
                    ulp * std::fabs(v) +
                        8 * std::max(unit, k.prob == DType::f32 ? 1e-7 : 0) *
                            (std::fabs(v) + 1 / std::max(1e-30, k.reduction == Reduction::mean ? want.d : 1)) +
                        (k.prob == DType::f16 ? 0x1p-25 : 0),
                    row * n + c);
        }
      report(k, "grad_target", worst);
    }
  }

  // value and gradient in one launch
  if (!per_row && !(k.in_place && k.graph)) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < n; ++c) store_host(logits.host.data(), k.type, at(k.strides, row, c), x[row * n + c]);
    if (k.in_place) logits.upload();
    grad.poison();
    loss.poison();
    a.grad = k.in_place ? logits.data() : grad.data();
    run("value+grad", cross_entropy_forward_cuda, a);
    bad_target_take_cuda();
    check_grad("value+grad", ones, k.in_place ? logits : grad);
    loss.download();
    Worst again;
    again.see(load_host(loss.host.data(), loss_type, 0), want.loss,
              (half_ulp + 2 * unit) * std::fabs(want.loss) + 4 * unit, 0);
    report(k, "loss+grad", again);
  }
  OK(cudaStreamDestroy(stream));
}

// One case or two for each kernel, launch and dtype: what a sanitizer has time for.
static void check_few() {
  for (DType type : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    const int64_t l = 16 / size_of(type);
    for (int64_t v : {1, 9, 40, 200, 260, 1100, 2100, 4097, 9000, 20000, 33000, 66000}) {
      if ((type == DType::f16 && v > 40) || (type == DType::f64 && v > 4097)) continue;
      Case k;
      k.type = type;
      k.classes = v * l + 1;
      k.outer = v < 64 ? 133 : v < 5000 ? 3 : 1;
      k.what = "few rows";
      k.weight = true;
      check(k);
      k.what = "few rows in place";
      k.in_place = true;
      k.offset = v % 2;
      check(k);
      if (v > 9000) continue;
      k.what = "few rows general";
      k.in_place = false;
      k.smoothing = 0.1;
      k.softcap = 5;
      k.argmax = true;
      check(k);
    }
    if (type == DType::bf16) {  // forward alone streams where there are more than four rows for each multiprocessor
      Case k;
      k.type = type;
      k.outer = 800;
      k.classes = 3100 * l + 1;
      k.what = "few long rows";
      check(k);
    }
    for (const auto& shape : std::vector<std::array<int64_t, 3>>{
             {2, 5, 66}, {2, 21, 64}, {2, 21, 33}, {2, 30, 64}, {2, 30, 33}, {1, 170, 64}, {1, 170, 33}}) {
      Case k;
      k.type = type;
      k.outer = shape[0];
      k.classes = shape[1];
      k.inner = shape[2];
      k.what = "few planes";
      k.weight = true;
      check(k);
      k.what = "few planes general";
      k.smoothing = 0.1;
      k.argmax = true;
      check(k);
    }
    Case k;
    k.type = type;
    k.what = "few soft";
    k.classes = 300;
    k.soft = k.target_grad = true;
    check(k);
    k.soft = k.target_grad = false;
    k.what = "few bad";
    k.bad = true;
    check(k);
  }
  std::printf("checks %d, failures %d\n", checks, failures);
}

static void check_all() {
  const DType types[] = {DType::f32, DType::f16, DType::bf16, DType::f64};
  auto with = [](Case c, const char* what, auto f) {
    c.what = what;
    f(c);
    return c;
  };
  for (DType type : types) {
    // Around every boundary of the policy, in 16-byte vectors: lanes, warp rows, block rows, clusters, streaming.
    const int64_t l = 16 / size_of(type);
    std::vector<int64_t> vectors = {1,    2,    4,     5,     8,     16,    32,    33,    64,    128,
                                    129,  250,  256,   257,   1024,  1025,  2048,  2049,  4096,  4097,
                                    8192, 9000, 16384, 20000, 32768, 33000, 65536, 66000, 140000};
    for (int64_t v : vectors)
      for (int64_t delta : {-1, 0, 1}) {
        const int64_t c = v * l + delta;
        if (c < 1) continue;
        if (v > 4200 && type == DType::f64) continue;
        Case k;
        k.type = type;
        k.classes = c;
        k.outer = v < 64 ? 173 : v < 1000 ? 29 : v < 10000 ? 11 : 6;
        k.what = "rows";
        check(k);
        if (delta == 0) {
          check(with(k, "rows offset 1", [](Case& x) { x.offset = 1; }));
          check(with(k, "rows in place", [](Case& x) { x.in_place = true; }));
          check(with(k, "rows smooth weight", [](Case& x) { x.smoothing = 0.1, x.weight = true; }));
        } else {
          check(with(k, "rows none in place", [](Case& x) { x.in_place = true, x.reduction = Reduction::none; }));
        }
        if (delta == 1 && v < 20000) {
          check(with(k, "rows weight sample sum",
                     [](Case& x) { x.weight = x.sample = true, x.reduction = Reduction::sum, x.z_loss = 1e-3; }));
          check(
              with(k, "rows special", [](Case& x) { x.special = true, x.outer = 45, x.reduction = Reduction::none; }));
          check(with(k, "rows special mean", [](Case& x) { x.special = true, x.outer = 45; }));
          check(with(k, "rows special argmax", [](Case& x) { x.special = x.argmax = true, x.outer = 45; }));
          check(with(k, "rows general", [](Case& x) {
            x.softcap = 5, x.scale = 0.7, x.smoothing = 0.2, x.argmax = true, x.sample = true;
          }));
          check(with(k, "rows soft",
                     [](Case& x) { x.soft = true, x.target_grad = true, x.argmax = true, x.weight = true; }));
          check(with(k, "rows other grad layout", [&](Case& x) { x.grad_strides = {c + 3, 1, 0}, x.grad_offset = 1; }));
          check(with(k, "rows padded", [&](Case& x) { x.strides = {c + 5, 1, 0}; }));
          check(with(k, "rows bad", [](Case& x) { x.bad = true; }));
          check(with(k, "rows large", [](Case& x) { x.shift = 1e4, x.reduction = Reduction::none, x.spread = 1; }));
        }
      }
    for (const auto& shape : std::vector<std::array<int64_t, 3>>{{3, 21, 640},
                                                                 {2, 21, 513},
                                                                 {1, 150, 768},
                                                                 {5, 2, 7},
                                                                 {3, 1, 9},
                                                                 {2, 161, 256},
                                                                 {2, 400, 130},
                                                                 {300, 5, 3},
                                                                 {2, 80, 1032},
                                                                 {7, 81, 64},
                                                                 {2, 1500, 96}}) {
      const int64_t o = shape[0], c = shape[1], i = shape[2];
      Case k;
      k.type = type;
      k.outer = o;
      k.classes = c;
      k.inner = i;
      k.what = "plane";
      check(k);
      check(with(k, "plane in place", [](Case& x) { x.in_place = true; }));
      check(with(k, "plane weight none", [](Case& x) { x.weight = x.sample = true, x.reduction = Reduction::none; }));
      check(with(k, "plane smooth", [](Case& x) { x.smoothing = 0.1, x.weight = true, x.z_loss = 1e-3; }));
      check(with(k, "plane soft", [](Case& x) { x.soft = true, x.target_grad = true, x.argmax = true; }));
      check(with(k, "plane special", [](Case& x) { x.special = true, x.reduction = Reduction::none; }));
      check(with(k, "plane bad", [](Case& x) { x.bad = true; }));
      check(with(k, "plane offset", [](Case& x) { x.offset = 1; }));
      check(with(k, "plane general", [](Case& x) { x.softcap = 5, x.smoothing = 0.2, x.argmax = true; }));
      check(with(k, "channels last", [&](Case& x) { x.strides = {c * i, 1, c}; }));
      check(with(k, "channels last sliced", [&](Case& x) { x.strides = {c * i + 4 * c, 1, c}; }));
      check(with(k, "generic strides", [&](Case& x) { x.strides = {c * (2 * i + 1) + 3, 2 * i + 1, 2}; }));
      check(with(k, "transposed", [&](Case& x) { x.outer = o * i, x.inner = 1, x.strides = {1, o * i, 0}; }));
    }
  }
  for (DType type : types)
    for (DType prob : types)
      for (int64_t c : {7, 129, 5000}) {
        Case k;
        k.type = type;
        k.prob = prob;
        k.classes = c;
        k.outer = 9;
        k.soft = k.target_grad = true;
        k.smoothing = 0.1;
        k.what = "soft dtypes";
        check(k);
        check(with(k, "soft zero times inf",
                   [](Case& x) { x.special = x.zero_times_inf = true, x.smoothing = 0, x.target_grad = false; }));
      }
  for (int index = 0; index < 8; ++index)
    for (int64_t inner : {1, 33}) {
      Case k;
      k.index = IndexType(index);
      k.classes = 100;
      k.outer = 50;
      k.inner = inner;
      k.what = "index types";
      check(k);
    }
  Case k;
  k.classes = 33;
  check(with(k, "all ignored", [](Case& x) { x.all_ignored = true; }));
  check(with(k, "all ignored zero", [](Case& x) { x.all_ignored = x.all_zero = x.argmax = true, x.z_loss = 1; }));
  check(with(k, "all ignored special", [](Case& x) { x.all_ignored = x.special = true, x.outer = 18; }));
  check(with(k, "no rows mean", [](Case& x) { x.outer = 0; }));
  check(with(k, "no rows sum", [](Case& x) { x.outer = 0, x.reduction = Reduction::sum; }));
  check(with(k, "zero times inf",
             [](Case& x) { x.special = x.zero_times_inf = x.weight = true, x.smoothing = 0.1, x.outer = 36; }));
  check(with(k, "graph", [](Case& x) { x.graph = true, x.outer = 5000; }));
  check(with(k, "graph cluster", [](Case& x) { x.graph = true, x.classes = 70001, x.outer = 40; }));
  check(with(k, "many rows", [](Case& x) { x.outer = 300001, x.classes = 10, x.weight = true; }));
  check(with(k, "many rows 1000", [](Case& x) { x.outer = 40001, x.classes = 1001; }));

  // nll and scale
  for (DType type : types)
    for (Reduction reduction : {Reduction::none, Reduction::mean, Reduction::sum}) {
      const int64_t o = 7, c = 19, i = 1300, rows = o * i;
      Buffer x(rows * c * size_of(type)), g(x.bytes), t(rows * 8), w(c * size_of(accum_of(type)));
      Buffer loss((reduction == Reduction::none ? rows : 1) * size_of(type)), total(size_of(accum_of(type)));
      Buffer up(rows * size_of(type));
      std::mt19937 rng(3);
      for (int64_t j = 0; j < rows * c; ++j) store_host(x.host.data(), type, j, -double(rng() % 1000) / 250);
      for (int64_t j = 0; j < rows; ++j)
        reinterpret_cast<int64_t*>(t.host.data())[j] = j % 11 ? int64_t(rng() % c) : -100;
      for (int64_t j = 0; j < c; ++j) store_host(w.host.data(), accum_of(type), j, 0.5 + j);
      for (int64_t j = 0; j < rows; ++j) store_host(up.host.data(), type, j, 2);
      for (Buffer* b : {&x, &t, &w, &up}) b->upload();
      RowLossArgs a;
      a.outer = o, a.classes = c, a.inner = i;
      a.input = x.data(), a.input_type = type, a.input_strides = {c * i, i, 1};
      a.target = t.data(), a.weight = w.data(), a.reduction = reduction;
      a.loss = loss.data(), a.total_weight = total.data();
      a.grad_output = up.data(), a.grad_output_per_row = reduction == Reduction::none;
      a.grad = g.data(), a.grad_strides = a.input_strides;
      CudaContext context;
      context.workspace_bytes = row_loss_workspace_bytes_cuda(a, context);
      Buffer workspace(context.workspace_bytes);
      context.workspace = workspace.data();
      const Status s1 = row_loss_forward_cuda(a, context), s2 = row_loss_backward_cuda(a, context);
      OK(cudaDeviceSynchronize());
      double sum = 0, weights = 0;
      Case label;
      label.what = "nll";
      label.type = type;
      Worst wl, wg;
      loss.download();
      g.download();
      const double tol = type == DType::f64 ? 1e-12 : type == DType::f32 ? 1e-5 : 1e-2;
      for (int pass = 0; pass < 2; ++pass)
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t cls = reinterpret_cast<int64_t*>(t.host.data())[r];
          const double wt = cls >= 0 ? load_host(w.host.data(), accum_of(type), cls) : 0;
          const double v = cls >= 0 ? -wt * load_host(x.host.data(), type, (r / i * c + cls) * i + r % i) : 0;
          if (pass == 0) {
            sum += v, weights += wt;
            if (reduction == Reduction::none)
              wl.see(load_host(loss.host.data(), type, r), v, tol * (1 + std::fabs(v)), r);
          } else {
            for (int64_t q = 0; q < c; ++q) {
              const double gr = q == cls ? -wt * 2 / (reduction == Reduction::mean ? weights : 1) : 0;
              wg.see(load_host(g.host.data(), type, (r / i * c + q) * i + r % i), gr, tol * std::fabs(gr) + 1e-7, r);
            }
          }
        }
      if (reduction != Reduction::none) {
        const double v = reduction == Reduction::mean ? sum / weights : sum;
        if (!(type == DType::f16 && std::fabs(v) > 65000))
          wl.see(load_host(loss.host.data(), type, 0), v, tol * (1 + std::fabs(v)), 0);
      }
      report(label, "nll loss", wl);
      report(label, "nll grad", wg);
      if (s1.code || s2.code) ++failures, std::printf("FAIL nll status\n");
      for (double scale : {1.0, 0.5}) {
        for (int64_t count : {int64_t(1), int64_t(4097), rows * c}) {
          store_host(up.host.data(), type, 0, scale);
          up.upload();
          Buffer out(rows * c * size_of(type));
          const Status s3 = scale_grad_cuda(x.data(), out.data(), type, count, up.data(), type, context);
          OK(cudaDeviceSynchronize());
          out.download();
          Worst worst;
          for (int64_t j = 0; j < count; ++j)
            worst.see(load_host(out.host.data(), type, j), load_host(x.host.data(), type, j) * scale, 1e-9, j);
          label.what = "scale_grad";
          report(label, "scale", worst);
          if (s3.code) ++failures, std::printf("FAIL scale status\n");
        }
      }
    }
  std::printf("checks %d, failures %d, worst gradient error/tolerance %.3f\n", checks, failures, worst_ratio);
}

// ------------------------------------------------------------------------------------------------------- timing

__global__ void fill_random(unsigned* p, int64_t n, int bf16) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    uint64_t h = uint64_t(i) * 0x9E3779B97F4A7C15ull;
    h ^= h >> 29;
    h *= 0xBF58476D1CE4E5B9ull;
    h ^= h >> 32;
    const float a = float(unsigned(h) & 0xffff) / 8192.f - 4.f, b = float(unsigned(h >> 16) & 0xffff) / 8192.f - 4.f;
    if (bf16) {
      unsigned ua = __float_as_uint(a) >> 16, ub = __float_as_uint(b) >> 16;
      p[i] = ua | ub << 16;
    } else {
      p[i] = __float_as_uint(a);
    }
  }
}

static cudaStream_t timing_stream;

// Seconds of one f(i), captured `reps` times into a graph; median of several replays.
static double seconds_of(int reps, const std::function<void(int)>& f) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  OK(cudaStreamBeginCapture(timing_stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < reps; ++i) f(i);
  OK(cudaStreamEndCapture(timing_stream, &graph));
  OK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t e0, e1;
  OK(cudaEventCreate(&e0));
  OK(cudaEventCreate(&e1));
  std::vector<float> ms;
  for (int r = 0; r < 7; ++r) {
    OK(cudaEventRecord(e0, timing_stream));
    OK(cudaGraphLaunch(exec, timing_stream));
    OK(cudaEventRecord(e1, timing_stream));
    OK(cudaStreamSynchronize(timing_stream));
    float t;
    OK(cudaEventElapsedTime(&t, e0, e1));
    if (r) ms.push_back(t);
  }
  std::sort(ms.begin(), ms.end());
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaEventDestroy(e0);
  cudaEventDestroy(e1);
  return ms[ms.size() / 2] * 1e-3 / reps;
}

static void time_all() {
  OK(cudaStreamCreateWithFlags(&timing_stream, cudaStreamNonBlocking));
  const int64_t pool = int64_t(10) << 30;  // logits in the first half, gradients in the second
  unsigned char* memory;
  OK(cudaMalloc(&memory, 2 * pool));
  unsigned char* small;
  OK(cudaMalloc(&small, int64_t(1) << 28));
  const double copy_s = seconds_of(4, [&](int i) {
    OK(cudaMemcpyAsync(memory + pool + (i << 30), memory + (int64_t(i) << 30), 1 << 30, cudaMemcpyDeviceToDevice,
                       timing_stream));
  });
  const double copy = 2.0 * (1 << 30) / copy_s * 1e-9;
  std::printf("copy 1 GiB device to device: %.0f GB/s (read + write)\n", copy);
  std::printf("%-28s %-5s | %-24s | %-24s | %-24s\n", "shape", "dtype", "forward us GB/s %copy", "value+grad",
              "backward");
  struct Shape {
    int64_t o, c, i;
    bool weight = false;
  };
  std::vector<Shape> shapes = {
      {32768, 10, 1},    {262144, 10, 1},          {262144, 21, 1},           {32768, 256, 1},
      {32768, 512, 1},   {32768, 1000, 1},         {32768, 1001, 1},          {32768, 1024, 1},
      {32768, 2048, 1},  {32768, 4096, 1},         {32768, 8192, 1},          {32768, 16384, 1},
      {32768, 32768, 1}, {32768, 65536, 1},        {16384, 131072, 1},        {8192, 262144, 1},
      {8192, 50257, 1},  {8192, 128256, 1},        {8192, 151936, 1},         {64, 10, 1},
      {4096, 1000, 1},   {8, 21, 512 * 512, true}, {4, 150, 512 * 512, true}, {8, 21, 513 * 513, true}};
  for (DType type : {DType::bf16, DType::f32}) {
    OK(cudaDeviceSynchronize());
    fill_random<<<4096, 256>>>(reinterpret_cast<unsigned*>(memory), pool / 4, type == DType::bf16);
    OK(cudaDeviceSynchronize());
    for (const Shape& s : shapes) {
      const int64_t rows = s.o * s.i, bytes = rows * s.c * size_of(type);
      const int64_t step = (bytes + 255) / 256 * 256;
      if (bytes > pool) {
        std::printf("%lldx%lldx%lld %s skipped: larger than the pool\n", (long long)s.o, (long long)s.c, (long long)s.i,
                    name_of(type));
        continue;
      }
      const int sets = int(std::max<int64_t>(1, std::min<int64_t>(pool / step, 200)));
      const int reps = int(std::max<int64_t>(2, std::min<int64_t>(40, (int64_t(6) << 30) / bytes)));
      std::vector<int64_t> t(rows);
      for (int64_t r = 0; r < rows; ++r) t[r] = (r * 7919) % s.c;
      OK(cudaMemcpy(small, t.data(), rows * 8, cudaMemcpyHostToDevice));
      CrossEntropyArgs a;
      a.outer = s.o, a.classes = s.c, a.inner = s.i;
      a.logits_type = type;
      a.logits_strides = s.i == 1 ? Strides{s.c, 1, 0} : Strides{s.c * s.i, s.i, 1};
      a.grad_strides = a.logits_strides;
      a.target = small;
      unsigned char* next = small + (rows * 8 + 255) / 256 * 256;
      auto take = [&](int64_t n) {
        unsigned char* p = next;
        next += (n + 255) / 256 * 256;
        return p;
      };
      a.loss = take(4);
      a.loss_type = DType::f32;
      std::vector<float> ones(std::max<int64_t>(s.c, 1), 1.f);
      void* weight = take(4 * s.c);
      OK(cudaMemcpy(weight, ones.data(), 4 * s.c, cudaMemcpyHostToDevice));
      a.weight = s.weight ? weight : nullptr;
      void* up = take(4);
      OK(cudaMemcpy(up, ones.data(), 4, cudaMemcpyHostToDevice));
      void* saved = take(a.saved_count() * 4);
      CudaContext c;
      c.stream = timing_stream;
      a.logits = memory;
      c.workspace_bytes = cross_entropy_workspace_bytes_cuda(a, c) + (1 << 22);
      c.workspace = take(c.workspace_bytes);
      auto must = [&](Status st) {
        if (st.code) std::printf("status %d %lld\n", st.code, (long long)st.value), std::exit(3);
      };
      auto at = [&](int i) { return int64_t(i % sets) * step; };
      const double f = seconds_of(reps, [&](int i) {
        CrossEntropyArgs b = a;
        b.logits = memory + at(i);
        must(cross_entropy_forward_cuda(b, c));
      });
      const double v = seconds_of(reps, [&](int i) {
        CrossEntropyArgs b = a;
        b.logits = memory + at(i);
        b.grad = memory + pool + at(i);
        must(cross_entropy_forward_cuda(b, c));
      });
      CrossEntropyArgs b0 = a;
      b0.saved = saved;
      must(cross_entropy_forward_cuda(b0, c));
      OK(cudaStreamSynchronize(timing_stream));
      const double w = seconds_of(reps, [&](int i) {
        CrossEntropyArgs b = a;
        b.logits = memory + at(i);
        b.saved = saved;
        b.grad_output = up;
        b.grad = memory + pool + at(i);
        must(cross_entropy_backward_cuda(b, c));
      });
      char label[64];
      std::snprintf(label, sizeof label, "%lld x %lld x %lld", (long long)s.o, (long long)s.c, (long long)s.i);
      auto show = [&](double seconds, double passes) {
        const double gb = passes * bytes / seconds * 1e-9;
        std::printf(" | %9.1f %5.0f %5.1f%%  ", seconds * 1e6, gb, 100 * gb / copy);
      };
      std::printf("%-28s %-5s", label, name_of(type));
      show(f, 1), show(v, 2), show(w, 2);
      std::printf("\n");
      std::fflush(stdout);
    }
  }
}

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "all";
  if (argc > 2) largest_case = std::atoll(argv[2]);
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  cudaDeviceProp prop;
  OK(cudaGetDeviceProperties(&prop, 0));
  std::printf("%s, sm_%d%d, %d multiprocessors, L2 %d MiB\n", prop.name, prop.major, prop.minor,
              prop.multiProcessorCount, prop.l2CacheSize >> 20);
  if (what == "few") check_few();
  if (what == "check" || what == "all") check_all();
  if (what == "time" || what == "all") time_all();
  return failures != 0;
}
