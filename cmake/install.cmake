# What `cmake --install` gives: library, headers, command, man page, completions, pkg-config and
# CMake package files.
include(CMakePackageConfigHelpers)

install(TARGETS regraph EXPORT regraph-targets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/regraph DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        FILES_MATCHING PATTERN "*.h")
install(EXPORT regraph-targets NAMESPACE regraph::
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/regraph)

configure_package_config_file(cmake/regraph-config.cmake.in ${CMAKE_BINARY_DIR}/regraph-config.cmake
                              INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/regraph)
write_basic_package_version_file(${CMAKE_BINARY_DIR}/regraph-config-version.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/regraph-config.cmake
        ${CMAKE_BINARY_DIR}/regraph-config-version.cmake
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/regraph)
# wherever the tree is put
file(RELATIVE_PATH RGI_PC_UP /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
configure_file(cmake/regraph.pc.in ${CMAKE_BINARY_DIR}/regraph.pc @ONLY)
install(FILES ${CMAKE_BINARY_DIR}/regraph.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

if(TARGET regraph_cli)
  install(TARGETS regraph_cli RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
  if(NOT REGRAPH_SANITIZE)
    # All come from the table that --help is printed from.
    add_custom_command(TARGET regraph_cli POST_BUILD
                       COMMAND $<TARGET_FILE:regraph_cli> help --man > ${CMAKE_BINARY_DIR}/regraph.1
                       COMMAND $<TARGET_FILE:regraph_cli> help --completion bash
                               > ${CMAKE_BINARY_DIR}/regraph.bash
                       COMMAND $<TARGET_FILE:regraph_cli> help --completion zsh
                               > ${CMAKE_BINARY_DIR}/_regraph
                       COMMAND $<TARGET_FILE:regraph_cli> help --completion fish
                               > ${CMAKE_BINARY_DIR}/regraph.fish
                       VERBATIM)
    install(FILES ${CMAKE_BINARY_DIR}/regraph.1 DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)
    install(FILES ${CMAKE_BINARY_DIR}/regraph.bash RENAME regraph
            DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions)
    install(FILES ${CMAKE_BINARY_DIR}/_regraph
            DESTINATION ${CMAKE_INSTALL_DATADIR}/zsh/site-functions)
    install(FILES ${CMAKE_BINARY_DIR}/regraph.fish
            DESTINATION ${CMAKE_INSTALL_DATADIR}/fish/vendor_completions.d)
  endif()
  if(NOT CMAKE_INSTALL_RPATH)
    file(RELATIVE_PATH lib_from_bin ${CMAKE_INSTALL_FULL_BINDIR} ${CMAKE_INSTALL_FULL_LIBDIR})
    set_target_properties(regraph_cli PROPERTIES INSTALL_RPATH "$ORIGIN/${lib_from_bin}")
  endif()
endif()

# A Python wheel is the same tree inside the package (pyproject.toml), with jansson in it and, for
# cuBLASLt, the folders where pip puts NVIDIA's libraries.
if(SKBUILD)
  list(GET JANSSON_LINK_LIBRARIES 0 jansson)
  get_filename_component(jansson ${jansson} REALPATH)
  if(jansson MATCHES "\\.so")
    string(REGEX MATCH "libjansson\\.so\\.[0-9]+" jansson_name ${jansson})
    install(FILES ${jansson} DESTINATION ${CMAKE_INSTALL_LIBDIR} RENAME ${jansson_name})
  endif()
  set(rpath $ORIGIN)
  if(rgi_cuda)
    foreach(folder nvidia/cu${CUDAToolkit_VERSION_MAJOR}/lib nvidia/cublas/lib)
      list(APPEND rpath $ORIGIN/../../${folder})
    endforeach()
  endif()
  set_target_properties(regraph PROPERTIES INSTALL_RPATH "${rpath}")
endif()

# Something to try after installing.
install(FILES README.md LICENSE CHANGELOG.md DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/regraph)
install(DIRECTORY examples/ DESTINATION ${CMAKE_INSTALL_DATADIR}/regraph/examples
        FILES_MATCHING PATTERN "*.json"
        PATTERN "*.c" PATTERN "README.md")
