// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../config.hpp"

namespace perdita::inline PERDITA_ABI {

using index = std::ptrdiff_t;

namespace core {
/// Eigen's matrices, maps and blocks: anything of theirs whose coefficients lie in memory.
template <class M>
concept eigen_like = requires(M& m) {
  {m.data()};
  { m.rows() } -> std::convertible_to<index>;
  { m.cols() } -> std::convertible_to<index>;
  { m.innerStride() } -> std::convertible_to<index>;
  { m.outerStride() } -> std::convertible_to<index>;
  {std::remove_cvref_t<M>::IsRowMajor};
  {std::remove_cvref_t<M>::IsVectorAtCompileTime};
};
/// std::mdspan and its look-alikes.
template <class M, std::size_t Rank>
concept mdspan_like = requires(M& m) {
  {m.data_handle()};
  {m.extent(0)};
  {m.stride(0)};
  requires std::remove_cvref_t<M>::rank()
  == Rank;
};
template <class R>
concept range_like = !eigen_like<R> && requires(R & r) {
  {r.data()};
  { r.size() } -> std::convertible_to<std::size_t>;
};
} // namespace core

/// A row of numbers in somebody else's memory. Strides count elements and may be negative.
template <class T> struct vector_view {
  using element_type = T;
  T* data = nullptr;
  index size = 0;
  index stride = 1;

  constexpr vector_view() = default;
  constexpr vector_view(T* pointer, index length, index step = 1)
      : data(pointer), size(length), stride(step) {}
  template <class U>
  requires(std::same_as<const U, T> &&
           !std::is_const_v<U>) constexpr vector_view(const vector_view<U>& other)
      : data(other.data), size(other.size), stride(other.stride) {}
  template <core::range_like R>
  requires std::convertible_to<decltype(std::declval<R&>().data()), T*>
  constexpr vector_view(R&& range) : data(range.data()), size(static_cast<index>(range.size())) {}
  template <core::eigen_like M>
  requires(bool(std::remove_cvref_t<M>::IsVectorAtCompileTime) &&
           std::convertible_to<decltype(std::declval<M&>().data()),
                               T*>) constexpr vector_view(M&& vector)
      : data(vector.data()), size(vector.size()), stride(vector.innerStride()) {}
  template <core::mdspan_like<1> M>
  requires std::convertible_to<decltype(std::declval<M&>().data_handle()), T*>
  constexpr vector_view(M&& span)
      : data(span.data_handle()), size(static_cast<index>(span.extent(0))),
        stride(static_cast<index>(span.stride(0))) {}

  constexpr T& operator[](index i) const { return data[i * stride]; }
  constexpr bool empty() const { return size == 0; }
};

/// A table of numbers in somebody else's memory: element (r, c) of an ordinary matrix is
/// data[r * row_stride + c * col_stride]. Rows may also come in planes of `plane_rows` rows that
/// lie plane_stride apart, which is what images with their classes first need.
template <class T> struct matrix_view {
  using element_type = T;
  T* data = nullptr;
  index rows = 0;
  index cols = 0;
  index row_stride = 0;
  index col_stride = 1;
  index plane_rows = 0; ///< rows before the next plane; equal to `rows` where there is one plane
  index plane_stride = 0;

  constexpr matrix_view() = default;
  /// Row-major and packed.
  constexpr matrix_view(T* pointer, index row_count, index col_count)
      : matrix_view(pointer, row_count, col_count, col_count, 1) {}
  constexpr matrix_view(T* pointer, index row_count, index col_count, index row_step,
                        index col_step)
      : data(pointer), rows(row_count), cols(col_count), row_stride(row_step), col_stride(col_step),
        plane_rows(row_count) {}
  template <class U>
  requires(std::same_as<const U, T> &&
           !std::is_const_v<U>) constexpr matrix_view(const matrix_view<U>& m)
      : data(m.data), rows(m.rows), cols(m.cols), row_stride(m.row_stride),
        col_stride(m.col_stride), plane_rows(m.plane_rows), plane_stride(m.plane_stride) {}
  template <core::eigen_like M>
  requires std::convertible_to<decltype(std::declval<M&>().data()), T*>
  constexpr matrix_view(M&& m)
      : matrix_view(m.data(), m.rows(), m.cols(),
                    std::remove_cvref_t<M>::IsRowMajor ? m.outerStride() : m.innerStride(),
                    std::remove_cvref_t<M>::IsRowMajor ? m.innerStride() : m.outerStride()) {}
  template <core::mdspan_like<2> M>
  requires std::convertible_to<decltype(std::declval<M&>().data_handle()), T*>
  constexpr matrix_view(M&& m)
      : matrix_view(m.data_handle(), static_cast<index>(m.extent(0)),
                    static_cast<index>(m.extent(1)), static_cast<index>(m.stride(0)),
                    static_cast<index>(m.stride(1))) {}

  /// The rows (image, pixel) of a packed array images × classes × pixels.
  static constexpr matrix_view channels_first(T* pointer, index images, index classes,
                                              index pixels) {
    matrix_view m(pointer, images * pixels, classes, 1, pixels);
    m.plane_rows = pixels;
    m.plane_stride = classes * pixels;
    return m;
  }

  constexpr T* row(index r) const {
    return plane_rows == rows ? data + r * row_stride
                              : data + r / plane_rows * plane_stride + r % plane_rows * row_stride;
  }
  constexpr T& operator()(index r, index c) const { return row(r)[c * col_stride]; }
};

template <class T> matrix_view(T*, index, index) -> matrix_view<T>;
template <class T> matrix_view(T*, index, index, index, index) -> matrix_view<T>;
template <class T> vector_view(T*, index) -> vector_view<T>;
template <class T> vector_view(T*, index, index) -> vector_view<T>;

namespace core {
template <class M> struct element_of;
template <class M>
requires requires {
  typename std::remove_cvref_t<M>::element_type;
} &&(!eigen_like<M>)struct element_of<M> {
  using type = typename std::remove_cvref_t<M>::element_type;
};
template <class M>
requires(eigen_like<M> || (range_like<M> && !requires {
           typename std::remove_cvref_t<M>::element_type;
         })) struct element_of<M> {
  using type = std::remove_pointer_t<decltype(std::declval<M&>().data())>;
};

/// What can be seen as a matrix or as a vector, with the type of its elements.
template <class M>
concept matrix_like = requires {
  typename element_of<M>::type;
}
&&std::constructible_from<matrix_view<typename element_of<M>::type>, M&>;
template <class V>
concept vector_like = requires {
  typename element_of<V>::type;
}
&&std::constructible_from<vector_view<typename element_of<V>::type>, V&>;

template <matrix_like M> constexpr auto as_matrix(M& m) {
  return matrix_view<typename element_of<M>::type>(m);
}
template <vector_like V> constexpr auto as_vector(V& v) {
  return vector_view<typename element_of<V>::type>(v);
}
} // namespace core

} // namespace perdita::inline PERDITA_ABI
