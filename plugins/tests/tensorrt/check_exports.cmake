# cmake -DNM=… -DLIBRARY=… -DEXPECTED=a;b -P check_exports.cmake: a library defines these dynamic symbols and no others.
execute_process(COMMAND ${NM} -D --defined-only ${LIBRARY} OUTPUT_VARIABLE table COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^ \n]+\n" symbols "${table}")
string(REPLACE "\n" "" symbols "${symbols}")
list(SORT symbols)
if(NOT symbols STREQUAL EXPECTED)
  message(FATAL_ERROR "${LIBRARY} exports [${symbols}], expected [${EXPECTED}]")
endif()
