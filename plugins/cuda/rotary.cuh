// Rotary embedding of 16-byte chunks (8 elements), in float32, rounded once to the storage type.
#pragma once

#include "ptx.cuh"

namespace relay::cuda {

// (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), element by element.
template <class T>
__device__ __forceinline__ void rotate_word(uint32_t& x1, uint32_t& x2, uint32_t cosine, uint32_t sine) {
  const float2 a = T::unpack(x1), b = T::unpack(x2), c = T::unpack(cosine), s = T::unpack(sine);
  x1 = T::pack(a.x * c.x - b.x * s.x, a.y * c.y - b.y * s.y);
  x2 = T::pack(b.x * c.x + a.x * s.x, b.y * c.y + a.y * s.y);
}

// Half-split layout: chunks x1 and x2 lie R/2 elements apart and share their angles.
template <class T>
__device__ __forceinline__ void rotate_halves(uint4& x1, uint4& x2, const uint4& cosine, const uint4& sine) {
  rotate_word<T>(x1.x, x2.x, cosine.x, sine.x);
  rotate_word<T>(x1.y, x2.y, cosine.y, sine.y);
  rotate_word<T>(x1.z, x2.z, cosine.z, sine.z);
  rotate_word<T>(x1.w, x2.w, cosine.w, sine.w);
}

template <class T>
__device__ __forceinline__ uint32_t rotate_pair(uint32_t x, float cosine, float sine) {
  const float2 a = T::unpack(x);
  return T::pack(a.x * cosine - a.y * sine, a.y * cosine + a.x * sine);
}

// Interleaved layout: elements 2i and 2i+1 are a pair, so a chunk holds four pairs and meets four angles.
template <class T>
__device__ __forceinline__ void rotate_pairs(uint4& x, const uint2& cosine, const uint2& sine) {
  const float2 c0 = T::unpack(cosine.x), c1 = T::unpack(cosine.y);
  const float2 s0 = T::unpack(sine.x), s1 = T::unpack(sine.y);
  x.x = rotate_pair<T>(x.x, c0.x, s0.x);
  x.y = rotate_pair<T>(x.y, c0.y, s0.y);
  x.z = rotate_pair<T>(x.z, c1.x, s1.x);
  x.w = rotate_pair<T>(x.w, c1.y, s1.y);
}

// What a thread holds of a chunk between reading and writing it: the chunk, its partner in the half-split
// layout, angles.
struct RotaryChunk {
  uint4 x1, x2;
  uint4 cosine, sine;  // interleaved: x and y only
};

struct RotaryAngles {
  uint4 cosine, sine;
};

// The rotary caches as rows of angles; dim = 0: no rotary. A row's chunks are visited in two steps, so that a
// thread can have many reads under way before it needs the first. Half-split, a chunk of the first half takes
// its partner along, which does nothing of its own.
struct Rotary {
  const void* cosine;
  const void* sine;
  int dim;
  bool interleaved;

  __device__ __forceinline__ bool is_partner(int index) const {
    return !interleaved && index >= dim / 16 && index < dim / 8;
  }

  // Reads chunk `index` of a row at `position` (and what belongs to it) through load(chunk).
  template <class Load>
  __device__ __forceinline__ void read(RotaryChunk& chunk, int index, int position, Load load) const {
    const int half_chunks = dim / 16;  // chunks in R/2 elements
    if (is_partner(index)) return;
    chunk.x1 = load(index);
    if (index >= 2 * half_chunks) return;
    if (interleaved) {
      const size_t angle = (static_cast<size_t>(position) * half_chunks * 2 + index) * sizeof(uint2);
      const uint2 c = *reinterpret_cast<const uint2*>(static_cast<const char*>(cosine) + angle);
      const uint2 s = *reinterpret_cast<const uint2*>(static_cast<const char*>(sine) + angle);
      chunk.cosine = make_uint4(c.x, c.y, 0, 0);
      chunk.sine = make_uint4(s.x, s.y, 0, 0);
    } else {
      chunk.x2 = load(index + half_chunks);
      const size_t angle = (static_cast<size_t>(position) * half_chunks + index) * sizeof(uint4);
      chunk.cosine = *reinterpret_cast<const uint4*>(static_cast<const char*>(cosine) + angle);
      chunk.sine = *reinterpret_cast<const uint4*>(static_cast<const char*>(sine) + angle);
    }
  }

  // A row of dim / 8 chunks is dim / 16 pairs of them that share eight angles: half-split chunks i and i +
  // dim / 16, interleaved 2i and 2i + 1.
  __device__ __forceinline__ RotaryAngles angles(int position, int pair) const {
    const int64_t at = int64_t{position} * (dim / 16) + pair;
    return {static_cast<const uint4*>(cosine)[at], static_cast<const uint4*>(sine)[at]};
  }
  // Rotates a pair in place, through load(chunk) and store(chunk, value).
  template <class T, class Load, class Store>
  __device__ __forceinline__ void rotate(const RotaryAngles& by, int pair, Load load, Store store) const {
    const int first = interleaved ? 2 * pair : pair, second = interleaved ? first + 1 : pair + dim / 16;
    uint4 x1 = load(first), x2 = load(second);
    if (interleaved) {
      rotate_pairs<T>(x1, make_uint2(by.cosine.x, by.cosine.y), make_uint2(by.sine.x, by.sine.y));
      rotate_pairs<T>(x2, make_uint2(by.cosine.z, by.cosine.w), make_uint2(by.sine.z, by.sine.w));
    } else {
      rotate_halves<T>(x1, x2, by.cosine, by.sine);
    }
    store(first, x1);
    store(second, x2);
  }

  // Rotates what read() read, and hands each result to store(chunk, value).
  template <class T, class Store>
  __device__ __forceinline__ void write(RotaryChunk& chunk, int index, Store store) const {
    const int half_chunks = dim / 16;
    if (is_partner(index)) return;
    if (index >= 2 * half_chunks) {
      store(index, chunk.x1);
    } else if (interleaved) {
      rotate_pairs<T>(chunk.x1, make_uint2(chunk.cosine.x, chunk.cosine.y),
                      make_uint2(chunk.sine.x, chunk.sine.y));
      store(index, chunk.x1);
    } else {
      rotate_halves<T>(chunk.x1, chunk.x2, chunk.cosine, chunk.sine);
      store(index, chunk.x1);
      store(index + half_chunks, chunk.x2);
    }
  }
};

}  // namespace relay::cuda
