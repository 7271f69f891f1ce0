// The CPU kernels of simba_fx.ops: plain C functions over pointers and strides, built on first use (native.py).
//
// Sixteen channels travel side by side in one vector ("lanes") and time runs in order, so a state h[n] of sixteen
// channels is one register or one L1 line and no value of the recurrence ever leaves the core. Work is shared out over
// (row, group, channels). Everything is float32; results do not depend on the number of threads. Letters: see
// simba_fx.ops. Strides are in elements. The formulas are those of chunked.py, which is also the fallback.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <limits>
#include <vector>

namespace {

constexpr int kLanes = 16;
constexpr int kMaxStates = 256;
constexpr int kMaxTaps = 16;
constexpr int kChunk = 32;  // tokens whose states a backward pass holds at once
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kGone = -125.0f;  // 2^x counts as 0 below this

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

inline Lanes lanes(float x) { return Lanes{} + x; }
inline Lanes max(Lanes a, Lanes b) { return a > b ? a : b; }

// Every NaN as the one whose low bits are zero: others lose themselves where exp2 shifts bits into the exponent.
inline Lanes one_nan(Lanes x) { return x == x ? x : lanes(std::numeric_limits<float>::quiet_NaN()); }

// 2^x to a rounding or two; exactly 0 below 2^-125, infinity from 2^128 on. A minimax polynomial (relative error 2e-9 on
// [-1/2, 1/2], value 1 at 0), then the exponent. Of NaNs only `one_nan` stays one.
inline Lanes exp2(Lanes x) {
  const Lanes magic = lanes(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  x = x > 128.0f ? lanes(128.0f) : x;
  Lanes shifted = x + magic;
  Lanes r = x - (shifted - magic);
  Lanes p = r * 1.5353361816159341e-4f + 1.3398874445483989e-3f;
  p = p * r + 9.6184373582937233e-3f;
  p = p * r + 5.5503324710266318e-2f;
  p = p * r + 2.4022647913619727e-1f;
  p = p * r + 6.9314720285512887e-1f;
  p = p * r + 1.0f;
  Lanes scaled = (Lanes)((Ints)p + ((Ints)shifted << 23));
  return x < kGone ? lanes(0.0f) : scaled;
}

inline Lanes sigmoid(Lanes x) { return 1.0f / (1.0f + exp2(x * -kLog2e)); }

// log(1 + e^x) as max(x, 0) + log1p(e^-|x|), and log1p(e) = 2 artanh(e / (2 + e)): relative accuracy for every x.
inline Lanes softplus(Lanes x) {
  Lanes e = exp2((x > 0.0f ? -x : x) * kLog2e);
  Lanes s = e / (2.0f + e), q = s * s;
  Lanes p = q * (1.0f / 15) + (1.0f / 13);
  p = p * q + (1.0f / 11);
  p = p * q + (1.0f / 9);
  p = p * q + (1.0f / 7);
  p = p * q + (1.0f / 5);
  p = p * q + (1.0f / 3);
  p = p * q + 1.0f;
  Lanes soft = max(x, lanes(0.0f)) + 2.0f * s * p;
  return x > 20.0f ? x : soft;
}

// Up to sixteen channels at `at`, `stride` apart; lanes past `count` repeat the last channel.
inline Lanes load(const float* at, int64_t stride, int count) {
  Lanes v;
  if (stride == 1 && count == kLanes) {
    std::memcpy(&v, at, sizeof v);
  } else {
    for (int i = 0; i < kLanes; ++i) v[i] = at[std::min(i, count - 1) * stride];
  }
  return v;
}

inline Lanes load_or_zero(const float* at, int64_t stride, int count) {
  Lanes v = load(at, stride, count);
  for (int i = count; i < kLanes; ++i) v[i] = 0.0f;
  return v;
}

inline void store(float* at, Lanes v, int count) {
  if (count == kLanes) std::memcpy(at, &v, sizeof v);
  else std::memcpy(at, &v, 4 * count);
}

inline void add(float* at, Lanes v, int count) {
  Lanes sum = {};
  if (count == kLanes) std::memcpy(&sum, at, sizeof sum);
  else std::memcpy(&sum, at, 4 * count);
  store(at, sum + v, count);
}

// Lane n of the result is the sum over the lanes of v[n]: a transpose and an addition tree in fifteen steps.
inline Lanes sums(Lanes* v) {
  for (int i = 0; i < 8; ++i)
    v[i] = SHUFFLE(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLE(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; ++i)
    v[i] = SHUFFLE(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           SHUFFLE(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; ++i)
    v[i] = SHUFFLE(v[i], v[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           SHUFFLE(v[i], v[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return SHUFFLE(v[0], v[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         SHUFFLE(v[0], v[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

// Sixteen vectors as a matrix, transposed in place: off-diagonal blocks of 8, 4, 2 and 1 change places.
inline void transpose(Lanes* v) {
  for (int i = 0; i < 8; ++i) {
    Lanes a = v[i], b = v[i + 8];
    v[i] = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    v[i + 8] = SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  for (int i = 0; i < 16; i = (i + 5) & ~4) {
    Lanes a = v[i], b = v[i + 4];
    v[i] = SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    v[i + 4] = SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  for (int i = 0; i < 16; i = (i + 3) & ~2) {
    Lanes a = v[i], b = v[i + 2];
    v[i] = SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    v[i + 2] = SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int i = 0; i < 16; i += 2) {
    Lanes a = v[i], b = v[i + 1];
    v[i] = SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    v[i + 1] = SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
}

// A float32 operand over (row, channel, token), any strides; `data` is null when the operand is absent.
struct Tokens {
  const float* data;
  int64_t row, channel, token;
  const float* at(int64_t b, int64_t d, int64_t t) const { return data + b * row + d * channel + t * token; }
  Lanes read(int64_t b, int64_t d, int64_t t, int count) const { return load(at(b, d, t), channel, count); }
};

// Sixteen (or, at the end of a group, fewer) neighbouring channels of one row.
struct Tile {
  int64_t row, group, channel;
  int count;
};

}  // namespace

// Operands of a selective scan. B and C are (B, G, L, N) contiguous, A is (D, N), D and bias are (D,) or null.
struct Selective {
  Tokens u, delta, z;
  const float *A, *B, *C, *D, *bias;
  int64_t rows, channels, length, states, groups;
  int64_t softplus;
};

namespace {

// One operand of a tile, token by token. Where tokens lie side by side instead of channels, sixteen of them are read and
// transposed at once.
class Stream {
 public:
  Stream(const Tokens& operand, Tile at, int64_t tokens)
      : operand_(operand), tile_(at), tokens_(tokens), blocked_(operand.data && operand.token == 1 && operand.channel != 1) {}

  Lanes read(int64_t t) {
    if (!blocked_) return operand_.read(tile_.row, tile_.channel, t, tile_.count);
    if (t / kLanes != block_) fill(t / kLanes);
    return lanes_[t % kLanes];
  }

 private:
  void fill(int64_t block) {
    const int some = int(std::min<int64_t>(kLanes, tokens_ - block * kLanes));
    for (int i = 0; i < kLanes; ++i)  // channels past the last repeat it
      lanes_[i] = load(operand_.at(tile_.row, tile_.channel + std::min(i, tile_.count - 1), block * kLanes), 1, some);
    transpose(lanes_);
    block_ = block;
  }

  const Tokens& operand_;
  const Tile tile_;
  const int64_t tokens_;
  const bool blocked_;
  int64_t block_ = -1;
  Lanes lanes_[kLanes];
};

// What every selective kernel needs of a tile: rates in base 2, skip, bias, and rows of B and C.
struct SelectiveTile {
  const Selective& s;
  Tile tile;
  Lanes rate[kMaxStates];  // A * log2(e)
  Lanes skip, bias;
  const float *B, *C;
  Stream u, delta, z;

  SelectiveTile(const Selective& scan, Tile at)
      : s(scan), tile(at), u(s.u, at, s.length), delta(s.delta, at, s.length), z(s.z, at, s.length) {
    for (int64_t n = 0; n < s.states; ++n)
      rate[n] = one_nan(load(s.A + at.channel * s.states + n, s.states, at.count) * kLog2e);
    skip = s.D ? load(s.D + at.channel, 1, at.count) : lanes(0.0f);
    bias = s.bias ? load(s.bias + at.channel, 1, at.count) : lanes(0.0f);
    int64_t first = (at.row * s.groups + at.group) * s.length * s.states;
    B = s.B + first;
    C = s.C ? s.C + first : nullptr;
  }
  Lanes raw(int64_t t) { return one_nan(delta.read(t) + bias); }
  Lanes step(Lanes raw_step) const { return s.softplus ? softplus(raw_step) : raw_step; }
  Lanes input(int64_t t) { return u.read(t); }
};

// Calls work(tile) for the tiles of one block: `blocks` blocks share the tiles of each (row, group), in order.
template <class Work>
void each_tile(const Selective& s, int64_t task, int64_t blocks, Work work) {
  int64_t width = s.channels / s.groups, tiles = (width + kLanes - 1) / kLanes;
  int64_t block = task % blocks, group = task / blocks % s.groups, row = task / blocks / s.groups;
  for (int64_t i = tiles * block / blocks; i < tiles * (block + 1) / blocks; ++i) {
    int count = int(std::min<int64_t>(kLanes, width - i * kLanes));
    work(Tile{row, group, group * width + i * kLanes, count});
  }
}

template <int64_t kStates>
void scan_tile(const Selective& s, Tile tile, float* y, float* last) {
  const int64_t states = kStates ? kStates : s.states;
  SelectiveTile w(s, tile);
  Lanes h[kMaxStates] = {};
  for (int64_t t = 0; t < s.length; ++t) {
    Lanes u = w.input(t), dt = w.step(w.raw(t)), dtu = dt * u, even = w.skip * u, odd = {};
    const float *B = w.B + t * states, *C = w.C + t * states;
    int64_t n = 0;
    for (; n + 1 < states; n += 2) {
      h[n] = exp2(dt * w.rate[n]) * h[n] + dtu * B[n];
      h[n + 1] = exp2(dt * w.rate[n + 1]) * h[n + 1] + dtu * B[n + 1];
      even += h[n] * C[n];
      odd += h[n + 1] * C[n + 1];
    }
    if (n < states) {
      h[n] = exp2(dt * w.rate[n]) * h[n] + dtu * B[n];
      even += h[n] * C[n];
    }
    Lanes out = even + odd;
    if (s.z.data) {
      Lanes z = w.z.read(t);
      out *= z * sigmoid(z);
    }
    store(y + (tile.row * s.length + t) * s.channels + tile.channel, out, tile.count);
  }
  for (int64_t n = 0; n < states; ++n)
    for (int i = 0; i < tile.count; ++i)
      last[(tile.row * s.channels + tile.channel + i) * states + n] = h[n][i];
}

// Where gradients go: u, delta, z and dy-like are (B, L, D) contiguous; A (B, D, N) and D (B, D) are per row; B and C
// are per block, (B * G * blocks, L, N), zero on entry.
struct SelectiveGradients {
  float *u, *delta, *z, *A, *D, *B, *C;
};

struct BackwardScratch {
  std::vector<Lanes> starts, h, decay;
};

void backward_tile(const Selective& s, Tile tile, const Tokens& dy, const float* dlast, const SelectiveGradients& out,
                   float* dB, float* dC, BackwardScratch& scratch) {
  const int64_t states = s.states, length = s.length, chunks = (length + kChunk - 1) / kChunk;
  const int count = tile.count;
  SelectiveTile w(s, tile);
  scratch.starts.resize(chunks * states);
  scratch.h.resize((kChunk + 1) * states);
  scratch.decay.resize(kChunk * states);
  Lanes *starts = scratch.starts.data(), *hs = scratch.h.data(), *decays = scratch.decay.data();

  Lanes h[kMaxStates] = {};
  for (int64_t t = 0; t < (chunks - 1) * kChunk; ++t) {
    if (t % kChunk == 0) std::copy(h, h + states, starts + t / kChunk * states);
    Lanes dt = w.step(w.raw(t)), dtu = dt * w.input(t);
    for (int64_t n = 0; n < states; ++n) h[n] = exp2(dt * w.rate[n]) * h[n] + dtu * w.B[t * states + n];
  }
  if (chunks) std::copy(h, h + states, starts + (chunks - 1) * states);  // none: there are no tokens

  Lanes g[kMaxStates], dA[kMaxStates] = {}, dskip = {};
  const int64_t first = tile.row * s.channels + tile.channel;
  for (int64_t n = 0; n < states; ++n) g[n] = load_or_zero(dlast + first * states + n, states, count);
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t begin = chunk * kChunk, end = std::min(length, begin + kChunk);
    Lanes raws[kChunk], steps[kChunk], inputs[kChunk];
    std::copy(starts + chunk * states, starts + (chunk + 1) * states, hs);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t - begin;
      raws[i] = w.raw(t), steps[i] = w.step(raws[i]), inputs[i] = w.input(t);
      Lanes dt = steps[i], dtu = dt * inputs[i];
      const Lanes* before = hs + i * states;
      Lanes *after = hs + (i + 1) * states, *decay = decays + i * states;
      for (int64_t n = 0; n < states; ++n) {
        decay[n] = exp2(dt * w.rate[n]);
        after[n] = decay[n] * before[n] + dtu * w.B[t * states + n];
      }
    }
    for (int64_t t = end - 1; t >= begin; --t) {
      const int64_t i = t - begin, token = (tile.row * length + t) * s.channels + tile.channel;
      const Lanes *before = hs + i * states, *after = before + states, *decay = decays + i * states;
      const float *B = w.B + t * states, *C = w.C + t * states;
      const Lanes dt = steps[i], u = inputs[i], dtu = dt * u;
      Lanes dout = load_or_zero(dy.at(tile.row, tile.channel, t), dy.channel, count);
      if (s.z.data) {
        Lanes z = w.z.read(t), gate = sigmoid(z), y = w.skip * u;
        for (int64_t n = 0; n < states; ++n) y += after[n] * C[n];
        store(out.z + token, dout * y * gate * (1.0f + z * (1.0f - gate)), count);
        dout *= z * gate;
      }
      dskip += dout * u;
      Lanes response = {}, ddt = {};
      for (int64_t base = 0; base < states; base += kLanes) {
        const int64_t some = std::min<int64_t>(kLanes, states - base);
        Lanes forB[kLanes] = {}, forC[kLanes] = {};
        for (int64_t j = 0; j < some; ++j) {
          const int64_t n = base + j;
          Lanes gradient = g[n] + dout * C[n];
          forC[j] = dout * after[n];
          forB[j] = gradient * dtu;
          response += gradient * B[n];
          g[n] = gradient * decay[n];
          Lanes log_decay = g[n] * before[n];
          ddt += log_decay * w.rate[n];
          dA[n] += log_decay * dt;
        }
        add(dB + t * states + base, sums(forB), int(some));
        add(dC + t * states + base, sums(forC), int(some));
      }
      ddt = ddt * kLn2 + u * response;
      store(out.u + token, dt * response + w.skip * dout, count);
      store(out.delta + token, s.softplus ? ddt * sigmoid(raws[i]) : ddt, count);
    }
  }
  store(out.D + first, dskip, count);
  for (int64_t n = 0; n < states; ++n)
    for (int i = 0; i < count; ++i) out.A[(first + i) * states + n] = dA[n][i];
}

inline float largest(Lanes v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = std::max(most, v[i]);
  return most;
}

enum Reduction : int64_t { kLargest, kLargestAbsolute, kSquares };

// Largest contribution of each token over a tile, or the sum of squares, walking backwards from the query. States whose decay has reached 0 in
// every channel are left out from the last one down; where none is left the walk is over. `weight` (L, N) is C_q * B_t.
void score_tile(const Selective& s, Tile tile, const float* weight, int64_t query, Reduction reduction, Lanes* best) {
  SelectiveTile w(s, tile);
  Lanes remaining = {}, once = {};  // lanes beyond the tile repeat its last channel: squares count it once
  for (int i = 0; i < tile.count; ++i) once[i] = 1.0f;
  int64_t t = query, alive = s.states;
  for (; t >= 0; --t) {
    if ((query - t) % kLanes == 0) {
      while (alive > 0 && largest(remaining * w.rate[alive - 1]) < kGone) --alive;
      if (alive == 0) break;
    }
    Lanes dt = w.step(w.raw(t)), even = {}, odd = {};
    const float* at = weight + t * s.states;
    int64_t n = 0;
    for (; n + 1 < alive; n += 2) {
      even += exp2(remaining * w.rate[n]) * at[n];
      odd += exp2(remaining * w.rate[n + 1]) * at[n + 1];
    }
    if (n < alive) even += exp2(remaining * w.rate[n]) * at[n];
    Lanes share = dt * w.input(t) * (even + odd);
    if (reduction == kSquares) {
      best[t] += share * share * once;
    } else {
      if (reduction == kLargestAbsolute) share = max(share, -share);
      best[t] = max(best[t], share);
    }
    remaining += dt;
  }
  if (reduction != kSquares)
    for (; t >= 0; --t) best[t] = max(best[t], lanes(0.0f));
}

}  // namespace

// Operands of an SSD scan in float32: x, z (B, L, H, P) with any strides but unit stride in P; dt and decay = exp(dt A)
// (B, L, H) contiguous; B and C (B, G, L, N) contiguous; D (H, P) or null.
struct Ssd {
  Tokens x, z;  // "channel" strides over heads
  const float *dt, *decay, *B, *C, *D;
  int64_t rows, length, heads, width, states, groups;
};

namespace {

// kTiles * 16 neighbouring channels of one head: the state stays in L1 while time runs.
template <int kTiles>
void ssd_tile(const Ssd& s, int64_t row, int64_t head, int64_t p, int count, float* y, float* last) {
  const int64_t states = s.states, group = head / (s.heads / s.groups);
  const float* B = s.B + (row * s.groups + group) * s.length * states;
  const float* C = s.C + (row * s.groups + group) * s.length * states;
  const int rest = count - (kTiles - 1) * kLanes;
  auto read = [&](const float* at, int i) { return load(at + i * kLanes, 1, i + 1 < kTiles ? kLanes : rest); };
  Lanes h[kMaxStates][kTiles] = {}, skip[kTiles] = {};
  if (s.D)
    for (int i = 0; i < kTiles; ++i) skip[i] = read(s.D + head * s.width + p, i);
  for (int64_t t = 0; t < s.length; ++t, B += states, C += states) {
    const int64_t at = (row * s.length + t) * s.heads + head;
    const float decay = s.decay[at], dt = s.dt[at];
    Lanes x[kTiles], out[kTiles];
    for (int i = 0; i < kTiles; ++i) {
      x[i] = read(s.x.at(row, head, t) + p, i);
      out[i] = skip[i] * x[i];
      x[i] *= dt;
    }
    for (int64_t n = 0; n < states; ++n)
      for (int i = 0; i < kTiles; ++i) {
        h[n][i] = h[n][i] * decay + x[i] * B[n];
        out[i] += h[n][i] * C[n];
      }
    for (int i = 0; i < kTiles; ++i) {
      if (s.z.data) {
        Lanes z = read(s.z.at(row, head, t) + p, i);
        out[i] *= z * sigmoid(z);
      }
      store(y + at * s.width + p + i * kLanes, out[i], i + 1 < kTiles ? kLanes : rest);
    }
  }
  float* to = last + ((row * s.heads + head) * s.width + p) * states;
  for (int64_t n = 0; n < states; ++n)
    for (int i = 0; i < count; ++i) to[i * states + n] = h[n][i / kLanes][i % kLanes];
}

}  // namespace

extern "C" {

int64_t simba_max_states() { return kMaxStates; }
int64_t simba_max_taps() { return kMaxTaps; }

// y (B, L, D) contiguous, last (B, D, N) contiguous.
void simba_selective_scan(const Selective* s, float* y, float* last, int64_t blocks, int threads) {
  const int64_t tasks = s->rows * s->groups * blocks;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task)
    each_tile(*s, task, blocks, [&](Tile tile) {
      if (s->states == 16) scan_tile<16>(*s, tile, y, last);
      else scan_tile<0>(*s, tile, y, last);
    });
}

void simba_selective_scan_backward(const Selective* s, const Tokens* dy, const float* dlast,
                                   const SelectiveGradients* out, int64_t blocks, int threads) {
  const int64_t tasks = s->rows * s->groups * blocks, shared = s->length * s->states;
#pragma omp parallel num_threads(threads)
  {
    BackwardScratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task)
      each_tile(*s, task, blocks, [&](Tile tile) {
        backward_tile(*s, tile, *dy, dlast, *out, out->B + task * shared, out->C + task * shared, scratch);
      });
  }
}

// C (B, G, N) at the query; query (B,); score (B * G * blocks, L), on entry -inf, or 0 for sums of squares, untouched
// after the query.
void simba_selective_score(const Selective* s, const float* C, const int64_t* query, Reduction reduction, float* score,
                           int64_t blocks, int threads) {
  const int64_t tasks = s->rows * s->groups * blocks;
#pragma omp parallel num_threads(threads)
  {
    std::vector<Lanes> best(s->length);
    std::vector<float> weight(s->length * s->states);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t row = task / blocks / s->groups;
      const float *B = s->B + task / blocks * s->length * s->states, *at_query = C + task / blocks * s->states;
      for (int64_t t = 0; t <= query[row]; ++t)
        for (int64_t n = 0; n < s->states; ++n) weight[t * s->states + n] = at_query[n] * B[t * s->states + n];
      const bool squares = reduction == kSquares;
      std::fill(best.begin(), best.end(), lanes(squares ? 0.0f : -std::numeric_limits<float>::infinity()));
      each_tile(*s, task, blocks, [&](Tile tile) {
        score_tile(*s, tile, weight.data(), query[row], reduction, best.data());
      });
      for (int64_t t = 0; t <= query[row]; ++t)
        for (int i = 0; i < kLanes; ++i) {
          float& found = score[task * s->length + t];
          found = squares ? found + best[t][i] : std::max(found, best[t][i]);
        }
    }
  }
}

// y (B, L, H, P) and last (B, H, P, N), contiguous.
void simba_ssd_scan(const Ssd* s, float* y, float* last, int threads) {
  const int64_t wide = 2 * kLanes, parts = (s->width + wide - 1) / wide, tasks = s->rows * s->heads * parts;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t p = task % parts * wide, head = task / parts % s->heads, row = task / parts / s->heads;
    const int count = int(std::min(wide, s->width - p));
    if (count > kLanes) ssd_tile<2>(*s, row, head, p, count, y, last);
    else ssd_tile<1>(*s, row, head, p, count, y, last);
  }
}

// x any strides; weight (W, D) contiguous; bias (D,) or null; y (B, L, D) contiguous.
void simba_causal_conv1d(const Tokens* x, const float* weight, const float* bias, int64_t rows, int64_t channels,
                         int64_t length, int64_t taps, int64_t silu, float* y, int threads) {
  const int64_t block = 64, parts = (length + block - 1) / block;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < rows * parts; ++task) {
    const int64_t row = task / parts, begin = task % parts * block, end = std::min(length, begin + block);
    for (int64_t d = 0; d < channels; d += kLanes) {
      const int count = int(std::min<int64_t>(kLanes, channels - d));
      Lanes w[kMaxTaps], first = bias ? load(bias + d, 1, count) : lanes(0.0f);
      for (int64_t k = 0; k < taps; ++k) w[k] = load(weight + k * channels + d, 1, count);
      for (int64_t t = begin; t < end; ++t) {
        Lanes out = first;
        for (int64_t k = std::max<int64_t>(0, taps - 1 - t); k < taps; ++k)
          out += w[k] * x->read(row, d, t - taps + 1 + k, count);
        store(y + (row * length + t) * channels + d, silu ? out * sigmoid(out) : out, count);
      }
    }
  }
}

}  // extern "C"
