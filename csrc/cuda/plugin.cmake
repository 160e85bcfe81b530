# CUDA's plugin, beside the addon: libqlora_cuda.so where nvcc is, and the same sources for the host's compiler as
# libqlora_cuda_emulated.so, for tests. Addon and plugin share types, so that each refuses one of another build.
set(QLORA_CUDA AUTO CACHE STRING "build CUDA's plugin: ON, OFF, or AUTO where nvcc is found")
option(QLORA_CUDA_EMULATED "build the plugin that computes on the CPU, for tests" OFF)
set(QLORA_CUDA_ARCHITECTURES default CACHE STRING
    "as CMAKE_CUDA_ARCHITECTURES, but numbers; 'default' is $QLORA_CUDA_ARCHITECTURES or all that are known")
set(QLORA_CUDA_WANTED ${QLORA_CUDA_ARCHITECTURES})
if(QLORA_CUDA_WANTED STREQUAL "default")
  set(QLORA_CUDA_WANTED 75-real 80-real 86-real 89-real 90a-real 120-real 80-virtual)
  if(DEFINED ENV{QLORA_CUDA_ARCHITECTURES})
    set(QLORA_CUDA_WANTED $ENV{QLORA_CUDA_ARCHITECTURES})
  endif()
endif()
# 9.0 has instructions that only its own code may use.
list(TRANSFORM QLORA_CUDA_WANTED REPLACE "^90(-|$)" "90a\\1")
if(";${QLORA_CUDA_WANTED};" MATCHES ";(native|all|all-major);")
  message(FATAL_ERROR "QLORA_CUDA_ARCHITECTURES must name architectures, as 90a-real: ${CMAKE_MATCH_1} would leave 9.0 "
                      "without its own instructions")
endif()

file(GLOB QLORA_SHARED_HEADERS CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/core/*.h ${CMAKE_SOURCE_DIR}/csrc/ops/*.h)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${QLORA_SHARED_HEADERS})
set(QLORA_HASHES ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION})
foreach(header IN LISTS QLORA_SHARED_HEADERS)
  file(SHA256 ${header} hash)
  list(APPEND QLORA_HASHES ${hash})
endforeach()
string(SHA256 QLORA_PLUGIN_BUILD "${QLORA_HASHES}")
string(SUBSTRING ${QLORA_PLUGIN_BUILD} 0 16 QLORA_PLUGIN_BUILD)
file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/generated/plugin_build.h CONTENT
     "#define QLORA_PLUGIN_BUILD \"@QLORA_PLUGIN_BUILD@\"\n" @ONLY)

if(QLORA_NATIVE_TESTS OR QLORA_FUZZERS)
  return()
endif()

file(GLOB QLORA_CUDA_SOURCES CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/ops/*.cu ${CMAKE_SOURCE_DIR}/csrc/cuda/*.cu)
# nvcc takes longer over the headers of most operations than over them, so four of these are one file to it. It
# names them by their place in csrc/: in a path of this machine CMake would replace what stands between two @.
set(small ${QLORA_CUDA_SOURCES})
list(FILTER small INCLUDE REGEX "/ops/")
list(FILTER small EXCLUDE REGEX "/attention_")
list(REMOVE_ITEM QLORA_CUDA_SOURCES ${small})
set(count 0)
foreach(source IN LISTS small)
  math(EXPR unit "${count} / 4")
  math(EXPR count "${count} + 1")
  file(RELATIVE_PATH name ${CMAKE_SOURCE_DIR}/csrc ${source})
  string(APPEND text_${unit} "#include \"${name}\"\n")
endforeach()
foreach(i RANGE ${unit})
  file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/generated/ops_${i}.cu CONTENT "${text_${i}}" @ONLY)
  list(APPEND QLORA_CUDA_SOURCES ${CMAKE_BINARY_DIR}/generated/ops_${i}.cu)
endforeach()
# What operations need of the engine beside its headers.
set(QLORA_PLUGIN_ENGINE ${CMAKE_SOURCE_DIR}/csrc/core/codes.cpp)

function(qlora_plugin target)
  target_include_directories(${target} PRIVATE ${CMAKE_BINARY_DIR}/generated)
  set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/Release)
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    target_link_options(${target} PRIVATE -Wl,-z,nodelete -Wl,--no-undefined
                        -Wl,--version-script=${CMAKE_SOURCE_DIR}/csrc/cuda/plugin.map)
  endif()
endfunction()

if(QLORA_CUDA_EMULATED)
  file(GLOB QLORA_EMULATION CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/emulated/*.cpp)
  set(emulated ${CMAKE_BINARY_DIR}/generated/emulated)
  set(QLORA_EMULATED_SOURCES "")
  # CMake takes .cu for CUDA's language alone; a file that includes it is C++ to everyone.
  foreach(source IN LISTS QLORA_CUDA_SOURCES)
    string(REPLACE ${CMAKE_BINARY_DIR}/generated/ "" name ${source})
    string(REPLACE ${CMAKE_SOURCE_DIR}/csrc/ "" name ${name})
    file(CONFIGURE OUTPUT ${emulated}/${name}.cpp CONTENT "#include \"@name@\"\n" @ONLY)
    list(APPEND QLORA_EMULATED_SOURCES ${emulated}/${name}.cpp)
  endforeach()
  add_library(qlora_cuda_emulated SHARED ${QLORA_EMULATED_SOURCES} ${QLORA_EMULATION} ${QLORA_PLUGIN_ENGINE})
  target_compile_options(qlora_cuda_emulated PRIVATE -O2 -ftls-model=initial-exec -Wno-unknown-pragmas)
  target_precompile_headers(qlora_cuda_emulated PRIVATE ${CMAKE_SOURCE_DIR}/csrc/ops/op_table.h)
  # It runs where it was built; without the processor's own instructions each fma() is a call.
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-march=native QLORA_COMPILES_NATIVE)
  if(QLORA_COMPILES_NATIVE)
    target_compile_options(qlora_cuda_emulated PRIVATE -march=native)
  endif()
  qlora_plugin(qlora_cuda_emulated)
endif()

# nvcc would take whichever g++ comes first, and addon and plugin share the types of one C++ library.
if(NOT CMAKE_CUDA_HOST_COMPILER AND NOT DEFINED ENV{CUDAHOSTCXX})
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
endif()
if(QLORA_CUDA STREQUAL "AUTO")
  include(CheckLanguage)
  check_language(CUDA)
  set(QLORA_HAS_NVCC ${CMAKE_CUDA_COMPILER})
else()
  set(QLORA_HAS_NVCC ${QLORA_CUDA})
endif()
if(QLORA_HAS_NVCC)
  set(CMAKE_CUDA_ARCHITECTURES ${QLORA_CUDA_WANTED})
  enable_language(CUDA)
  # Of which a CMake that is older than nvcc knows nothing.
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  add_library(qlora_cuda SHARED ${QLORA_CUDA_SOURCES} ${QLORA_PLUGIN_ENGINE})
  set_target_properties(qlora_cuda PROPERTIES CUDA_STANDARD 20 CUDA_RUNTIME_LIBRARY Static
                        CUDA_VISIBILITY_PRESET hidden)
  # As on the host, nothing is contracted or approximated unless a kernel asks for it.
  target_compile_options(qlora_cuda PRIVATE
                         $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false --expt-relaxed-constexpr -lineinfo --threads=1>)
  target_link_options(qlora_cuda PRIVATE -Wl,--exclude-libs,ALL)
  qlora_plugin(qlora_cuda)
endif()
