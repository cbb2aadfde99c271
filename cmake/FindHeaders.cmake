# relay_find_headers(NAME header package minimum archive-url): makes the interface target relay::NAME.
#
# Looks, in this order, in ${NAME}_ROOT (CMake variable or environment), in the system's include folders, in the
# distribution's own package (downloaded and unpacked under RELAY_DEPS_DIR; needs no root), and in upstream's archive.

set(RELAY_DEPS_DIR "${CMAKE_SOURCE_DIR}/build/deps" CACHE PATH "Where downloaded headers are kept")
option(RELAY_DOWNLOAD "Download headers that this machine lacks" ON)

function(relay_find_headers name header package minimum archive_url)
  string(TOUPPER ${name} upper)
  set(suffixes include include/onnxruntime include/onnxruntime/core/session usr/include usr/include/onnxruntime)
  set(roots ${${upper}_ROOT} $ENV{${upper}_ROOT})
  set(variable RELAY_${upper}_INCLUDE_DIR)

  if(roots)
    find_path(${variable} ${header} PATHS ${roots} PATH_SUFFIXES ${suffixes} NO_DEFAULT_PATH)
    if(NOT ${variable})
      message(FATAL_ERROR "${upper}_ROOT is ${roots}, but there is no ${header} in it or its include folder")
    endif()
  endif()
  find_path(${variable} ${header} PATH_SUFFIXES onnxruntime onnxruntime/core/session)

  set(deps "${RELAY_DEPS_DIR}/${package}")
  if(NOT ${variable})
    find_path(${variable} ${header} PATHS ${deps} PATH_SUFFIXES ${suffixes} NO_DEFAULT_PATH)
  endif()
  set(log "downloads are off (RELAY_DOWNLOAD)")
  if(NOT ${variable} AND RELAY_DOWNLOAD)
    set(log "")
    message(STATUS "${name}: not on this machine, fetching the distribution's ${package}")
    execute_process(COMMAND sh "${CMAKE_SOURCE_DIR}/cmake/fetch_deb.sh" ${package} ${deps} ${minimum}
                    OUTPUT_VARIABLE log ERROR_VARIABLE log TIMEOUT 600)
    find_path(${variable} ${header} PATHS ${deps} PATH_SUFFIXES ${suffixes} NO_DEFAULT_PATH)
  endif()
  if(NOT ${variable} AND RELAY_DOWNLOAD AND archive_url)
    message(STATUS "${name}: fetching upstream's archive")
    file(DOWNLOAD "${archive_url}" "${deps}.part" TLS_VERIFY ON INACTIVITY_TIMEOUT 60 STATUS status)
    list(GET status 0 code)
    if(code EQUAL 0)
      file(ARCHIVE_EXTRACT INPUT "${deps}.part" DESTINATION "${deps}")
      # upstream's archives hold one folder named after the version
      file(GLOB folders LIST_DIRECTORIES true "${deps}/*")
      find_path(${variable} ${header} PATHS ${folders} PATH_SUFFIXES ${suffixes} NO_DEFAULT_PATH)
    endif()
    file(REMOVE "${deps}.part")
    string(APPEND log "\n${archive_url}: ${status}")
  endif()
  if(NOT ${variable})
    message(FATAL_ERROR
      "${name}: ${header} was not found. Install the package ${package}, or set ${upper}_ROOT (environment or "
      "-D${upper}_ROOT=...) to a folder that has it in include/. What was tried:\n${log}")
  endif()

  message(STATUS "${name}: ${${variable}}")
  add_library(relay_${name} INTERFACE)
  add_library(relay::${name} ALIAS relay_${name})
  target_include_directories(relay_${name} SYSTEM INTERFACE "${${variable}}")
endfunction()
