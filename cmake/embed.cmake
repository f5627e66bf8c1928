# Writes text files into a C file, so that nothing is looked for at run time: the shipped device
# profiles, the schemas and the parts of the HTML page for the library, the stock examples for
# `regraph tune`.
#   cmake -DOUT=FILE.c -DPREFIX=NAME -DFILES=A.json,B.json -P embed.cmake     → NAME_A, NAME_B
foreach(variable OUT PREFIX FILES)
  if(NOT DEFINED ${variable})
    message(FATAL_ERROR "embed.cmake needs -D${variable}=…")
  endif()
endforeach()

set(declarations "")
set(definitions "")
string(REPLACE "," ";" files "${FILES}")
foreach(file ${files})
  get_filename_component(name "${file}" NAME_WE)
  file(READ "${file}" text)
  string(REPLACE "\\" "\\\\" text "${text}")
  string(REPLACE "\"" "\\\"" text "${text}")
  string(REPLACE "\n" "\\n\"\n    \"" text "${text}")
  string(APPEND declarations "extern const char *const ${PREFIX}_${name};\n")
  string(APPEND definitions "const char *const ${PREFIX}_${name} =\n    \"${text}\";\n")
endforeach()
file(WRITE "${OUT}" "/* Made by cmake/embed.cmake. */\n${declarations}${definitions}")
