# ONNX Runtime's C headers, which its Python wheels do not carry. Those of any release from 1.18 on serve: the interface
# only grows.
#
#   trimkv_find_onnxruntime_headers(FETCH)
#
# sets TRIMKV_ONNXRUNTIME_HEADERS to the folder with onnxruntime_c_api.h, or to "". The folder is that of the CMake or
# environment variable ONNXRUNTIME_INCLUDE_DIR, else the system's, else what is unpacked from a Debian package into
# build/: by an earlier run or, if FETCH is true, now.

# libonnxruntime-dev 1.21.0 of Debian 13 has headers only, the same for each processor. The second address is Debian's
# archive of all its files, by their SHA-1. Whatever an address sends is used only with this SHA-256.
set(TRIMKV_HEADERS_SHA256 14f7d959d5deacbcf1504830d4189f91fc67382b399ed9ae9d3aa9c4050ced08)
set(TRIMKV_HEADERS_URLS
  http://deb.debian.org/debian/pool/main/o/onnxruntime/libonnxruntime-dev_1.21.0%2Bdfsg-1_amd64.deb
  https://snapshot.debian.org/file/24211608c53cf623c58ab2b2f9d4157ed06b3a76)
get_filename_component(TRIMKV_ROOT ${CMAKE_CURRENT_LIST_DIR}/../.. ABSOLUTE)
set(TRIMKV_HEADERS_FOLDER ${TRIMKV_ROOT}/build/onnxruntime-headers/${TRIMKV_HEADERS_SHA256})

# Sets `result` to the release of the headers in `folder`: 18 for 1.18; 0 where there are none.
function(trimkv_headers_release folder result)
  set(${result} 0 PARENT_SCOPE)
  if(EXISTS "${folder}/onnxruntime_c_api.h")
    file(STRINGS "${folder}/onnxruntime_c_api.h" line REGEX "^#define ORT_API_VERSION [0-9]+" LIMIT_COUNT 1)
    if(line MATCHES "([0-9]+)")
      set(${result} ${CMAKE_MATCH_1} PARENT_SCOPE)
    endif()
  endif()
endfunction()

# Downloads and unpacks the package. Writes to the end only what is whole.
function(trimkv_fetch_headers)
  set(part ${TRIMKV_HEADERS_FOLDER}.part)
  foreach(url ${TRIMKV_HEADERS_URLS})
    file(REMOVE_RECURSE ${part})
    file(MAKE_DIRECTORY ${part})
    file(DOWNLOAD ${url} ${part}/headers.deb STATUS status INACTIVITY_TIMEOUT 20 TIMEOUT 120)
    if(status MATCHES "^0;")
      file(SHA256 ${part}/headers.deb sum)
      if(sum STREQUAL TRIMKV_HEADERS_SHA256)
        file(ARCHIVE_EXTRACT INPUT ${part}/headers.deb DESTINATION ${part})
        file(ARCHIVE_EXTRACT INPUT ${part}/data.tar.xz DESTINATION ${part} PATTERNS "*/include/onnxruntime/*")
        file(RENAME ${part} ${TRIMKV_HEADERS_FOLDER})
        return()
      endif()
      set(status "its SHA-256 is ${sum}, not the one expected")
    endif()
    message(STATUS "not used: ${url} (${status})")
  endforeach()
  file(REMOVE_RECURSE ${part})
endfunction()

function(trimkv_find_onnxruntime_headers fetch)
  set(named "${ONNXRUNTIME_INCLUDE_DIR}")
  if(NOT named)
    set(named "$ENV{ONNXRUNTIME_INCLUDE_DIR}")
  endif()
  if(named)
    get_filename_component(found "${named}" ABSOLUTE BASE_DIR ${TRIMKV_ROOT})
    trimkv_headers_release("${found}" release)
    if(release LESS 18)
      message(FATAL_ERROR "ONNXRUNTIME_INCLUDE_DIR is '${named}', which holds no onnxruntime_c_api.h of ONNX Runtime "
        "1.18 or newer: name another folder, or leave it out and the headers are found or fetched")
    endif()
  else()
    find_path(found onnxruntime_c_api.h PATH_SUFFIXES onnxruntime onnxruntime/core/session NO_CACHE)
    trimkv_headers_release("${found}" release)
    if(release LESS 18)
      set(found ${TRIMKV_HEADERS_FOLDER}/usr/include/onnxruntime)
      if(fetch AND NOT EXISTS ${found})
        trimkv_fetch_headers()
      endif()
      if(NOT EXISTS ${found})
        set(found "")
      endif()
    endif()
  endif()
  set(TRIMKV_ONNXRUNTIME_HEADERS "${found}" PARENT_SCOPE)
endfunction()
