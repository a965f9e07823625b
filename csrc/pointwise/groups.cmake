# A group of losses is a header in losses/; its kernels are compiled by themselves, so that a change rebuilds little.
# Sets `variable` to the files to compile: the template filled in for each group of the sources, written to `folder`.
function(pointwise_groups variable template sources folder)
  file(GLOB headers CONFIGURE_DEPENDS ${sources}/pointwise/losses/*.h)
  set(files "")
  foreach(header IN LISTS headers)
    get_filename_component(group ${header} NAME_WE)
    string(REGEX REPLACE "pointwise_group_(.*)\\.in$" "pointwise_${group}_\\1" file ${template})
    string(REGEX REPLACE "_cpu\\.cpp$" "_${isa}.cpp" file ${file})
    configure_file(${sources}/pointwise/${template} ${folder}/${file} @ONLY)
    list(APPEND files ${folder}/${file})
  endforeach()
  set(${variable} ${files} PARENT_SCOPE)
endfunction()
